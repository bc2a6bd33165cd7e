"""Each objective equals a slow double loop written from the paper's formula, in value and in gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from amortlm.errors import DataError, RewardError
from amortlm.objectives import (
    alpha_divergence,
    db,
    final_log_w,
    forward_kl,
    group_log_mean_exp,
    log_weights,
    prefix_tb,
    subsample_states,
    subtb,
    tb,
    vargrad,
    with_root,
)
from amortlm.types import PolicyLogProbs

B, T = 8, 5
GROUP = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def batch(gaps: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_reward, log_pf, log_pterm, stop_mask) of B trajectories of many lengths, leaves with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([5, 3, 1, 4, 0, 2, 5, 3])
    states = torch.arange(T + 1)
    stop_mask = states <= lengths[:, None]
    stop_mask[3, 0] = stop_mask[7, 0] = False  # min_tokens = 1
    if gaps:
        stop_mask[0, 1:4] = stop_mask[1, 1] = stop_mask[6, [0, 2, 4]] = False
    written = states[:-1] < lengths[:, None]
    log_pf = torch.where(written, -normal(B, T).abs(), 0.0).requires_grad_()
    log_pterm = (-normal(B, T + 1).abs()).requires_grad_()
    return normal(B, T + 1), log_pf, log_pterm, stop_mask


def stopping(mask: Tensor) -> list[int]:
    return mask.nonzero().squeeze(1).tolist()


def residual(r: Tensor, pf: Tensor, pterm: Tensor, i: int, j: int) -> Tensor:
    """Hu et al. 2024, equation 3: between the states i < j of one trajectory."""
    steps = sum((pf[k - 1] for k in range(i + 1, j + 1)), torch.zeros((), dtype=pf.dtype))
    return r[i] + steps + pterm[j] - r[j] - pterm[i]


def slow_subtb(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor, lam: float = 1.0) -> Tensor:
    losses = []
    for b in range(B):
        total, weights = torch.zeros((), dtype=pf.dtype), 0.0
        for i in stopping(mask[b]):
            for j in stopping(mask[b]):
                if i < j:
                    total = total + lam ** (j - i - 1) * residual(r[b], pf[b], pterm[b], i, j) ** 2
                    weights += lam ** (j - i - 1)
        losses.append(total / weights if weights else total)
    return torch.stack(losses).mean()


def slow_db(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor) -> Tensor:
    losses = []
    for b in range(B):
        states = stopping(mask[b])
        pairs = list(pairwise(states))
        squares = [residual(r[b], pf[b], pterm[b], i, j) ** 2 for i, j in pairs]
        losses.append(sum(squares, torch.zeros((), dtype=pf.dtype)) / max(1, len(pairs)))
    return torch.stack(losses).mean()


def slow_final(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor) -> list[Tensor]:
    out = []
    for b in range(B):
        n = stopping(mask[b])[-1]
        out.append(r[b, n] - sum(pf[b, k] for k in range(n)) - pterm[b, n])
    return out


def slow_tb(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor, log_z: Tensor | None = None) -> Tensor:
    final = slow_final(r, pf, pterm, mask)
    if log_z is None:
        weights: dict[int, list[float]] = {}
        for g, w in zip(GROUP.tolist(), final, strict=True):
            weights.setdefault(g, []).append(math.exp(w.item()))
        log_z = torch.tensor([math.log(sum(w) / len(w)) for w in weights.values()], dtype=torch.float64)
    return sum((w - log_z[g]) ** 2 for g, w in zip(GROUP.tolist(), final, strict=True)) / B


def slow_prefix_tb(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor, log_z: Tensor | None = None) -> Tensor:
    """From the root to each stopping state; log Z unknown: the mean of what stands in its place."""
    reached = [
        [r[b, n] - sum(pf[b, k] for k in range(n)) - pterm[b, n] for n in stopping(mask[b])] for b in range(B)
    ]
    means = [sum(w.item() for w in states) / len(states) for states in reached]
    total = torch.zeros((), dtype=pf.dtype)
    for states, g in zip(reached, GROUP.tolist(), strict=True):
        mine = [mean for mean, h in zip(means, GROUP.tolist(), strict=True) if h == g]
        root = sum(mine) / len(mine) if log_z is None else log_z[g]
        total = total + sum((w - root) ** 2 for w in states) / len(states)
    return total / B


def slow_vargrad(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor, huber: float | None = None) -> Tensor:
    """Pairwise balance without Z: half the mean squared difference of pairs, or their mean Huber loss."""
    final, losses = slow_final(r, pf, pterm, mask), []
    for g in range(3):
        mine = [w for w, h in zip(final, GROUP.tolist(), strict=True) if h == g]
        apart = [mine[a] - mine[b] for a in range(len(mine)) for b in range(a)]
        each = [
            d**2 / 2 if huber is None or abs(d.item()) <= huber else huber * (d.abs() - huber / 2)
            for d in apart
        ]
        losses.append(sum(each) / len(apart))
    return sum(losses) / 3


def slow_alpha(r: Tensor, pf: Tensor, pterm: Tensor, mask: Tensor, alpha: float) -> Tensor:
    final, losses = slow_final(r, pf, pterm, mask), []
    for g in range(3):
        mine = [w for w, h in zip(final, GROUP.tolist(), strict=True) if h == g]
        total = sum(math.exp(alpha * w.item()) for w in mine)
        weights = [math.exp(alpha * w.item()) / total - 1 / len(mine) for w in mine]
        losses.append(sum(a * w for a, w in zip(weights, mine, strict=True)) / alpha)
    return sum(losses) / 3


LOG_Z = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
Fast = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, float]]]
OBJECTIVES: dict[str, tuple[Fast, Callable[..., Tensor]]] = {
    "subtb": (lambda w, m: subtb(w, m), slow_subtb),
    "subtb 0.9": (lambda w, m: subtb(w, m, 0.9), lambda *a: slow_subtb(*a, lam=0.9)),
    "subtb 1.5": (lambda w, m: subtb(w, m, 1.5), lambda *a: slow_subtb(*a, lam=1.5)),
    "db": (lambda w, m: db(w, m), slow_db),
    "tb learned": (lambda w, m: tb(w, m, GROUP, LOG_Z), lambda *a: slow_tb(*a, log_z=LOG_Z)),
    "tb estimated": (lambda w, m: tb(w, m, GROUP), slow_tb),
    "prefix_tb learned": (
        lambda w, m: prefix_tb(w, m, GROUP, LOG_Z),
        lambda *a: slow_prefix_tb(*a, log_z=LOG_Z),
    ),
    "prefix_tb estimated": (lambda w, m: prefix_tb(w, m, GROUP), slow_prefix_tb),
    "vargrad": (lambda w, m: vargrad(w, m, GROUP), slow_vargrad),
    "vargrad huber": (lambda w, m: vargrad(w, m, GROUP, 1.0), lambda *a: slow_vargrad(*a, huber=1.0)),
    "forward_kl": (lambda w, m: forward_kl(w, m, GROUP), lambda *a: slow_alpha(*a, alpha=1.0)),
    "alpha 0.3": (lambda w, m: alpha_divergence(w, m, GROUP, 0.3), lambda *a: slow_alpha(*a, alpha=0.3)),
    "alpha 2": (lambda w, m: alpha_divergence(w, m, GROUP, 2.0), lambda *a: slow_alpha(*a, alpha=2.0)),
}


@pytest.mark.parametrize("gaps", [False, True], ids=["no gaps", "gaps"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_formula(name: str, gaps: bool) -> None:
    fast, slow = OBJECTIVES[name]
    log_reward, log_pf, log_pterm, mask = batch(gaps)
    loss, _ = fast(log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask), mask)
    expected = slow(log_reward, log_pf, log_pterm, mask)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    leaves = (log_pf, log_pterm)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert loss > 0.01


@pytest.mark.parametrize("name", OBJECTIVES)
def test_entries_outside_the_mask_are_ignored(name: str) -> None:
    fast, _ = OBJECTIVES[name]
    log_reward, log_pf, log_pterm, mask = batch(gaps=True)
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask).detach()
    assert (log_w[~mask] == 0).all()
    noisy = torch.where(mask, log_w, 7.0)
    torch.testing.assert_close(fast(noisy, mask)[0], fast(log_w, mask)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_agrees(name: str) -> None:
    fast, slow = OBJECTIVES[name]
    log_reward, log_pf, log_pterm, mask = batch(gaps=False)
    single = PolicyLogProbs(log_pf.float(), log_pterm.float())
    loss, metrics = fast(log_weights(log_reward.float(), single, mask), mask)
    expected = slow(log_reward, log_pf, log_pterm, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_constant_weights_have_no_loss_and_no_gradient(name: str) -> None:
    """Law 3: at q = R / Z every stopping state of a prompt has log_w = log Z."""
    fast, _ = OBJECTIVES[name]
    _, _, _, mask = batch(gaps=True)
    log_w = torch.where(mask, LOG_Z[GROUP][:, None], 0.0).requires_grad_()
    loss, _ = fast(log_w, mask)
    (gradient,) = torch.autograd.grad(loss, log_w)
    assert loss.item() < 1e-12
    assert gradient.abs().max() < 1e-6
    wrong = log_w.detach().clone()
    wrong[6, 5] += 0.1
    assert fast(wrong, mask)[0] > 1e-5


def test_trajectories_with_one_state_count_as_zero() -> None:
    log_w = torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for objective, expected in ((subtb, (1 + 9 + 4) / 3 / 2), (db, (1 + 4) / 2 / 2)):
        loss, metrics = objective(log_w, mask)
        assert loss.item() == pytest.approx(expected)
        assert metrics == {"trajectories_without_pair": 1}
    loss, _ = subtb(log_w[:1], mask[:1])
    assert loss == 0
    loss.backward()
    assert torch.isfinite(log_w.grad).all()


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=True)
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    groups = torch.arange(4).repeat_interleave(2)
    by_group = lambda w, m: forward_kl(w, m, groups[: len(w)])  # noqa: E731
    pairs = lambda w, m: vargrad(w, m, groups[: len(w)], 1.0)  # noqa: E731
    prefixes = lambda w, m: prefix_tb(w, m, groups[: len(w)])  # noqa: E731
    for objective in (subtb, db, by_group, pairs, prefixes):
        whole = torch.autograd.grad(objective(log_w, mask)[0], log_pf, retain_graph=True)[0]
        halves = (objective(log_w[:4], mask[:4])[0] + objective(log_w[4:], mask[4:])[0]) / 2
        torch.testing.assert_close(torch.autograd.grad(halves, log_pf, retain_graph=True)[0], whole)


def test_final_log_w_is_at_the_last_stopping_state() -> None:
    log_w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    assert final_log_w(log_w, mask).tolist() == [3.0, 5.0, 7.0]


def test_group_log_mean_exp() -> None:
    values = torch.tensor([0.0, math.log(3.0), 5.0, -2.0])
    out = group_log_mean_exp(values, torch.tensor([0, 0, 2, 1]))
    torch.testing.assert_close(out, torch.tensor([math.log(2.0), -2.0, 5.0]))


def test_tb_reports_log_z_and_learns_it() -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=False)
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    log_z = LOG_Z.clone().requires_grad_()
    loss, metrics = tb(log_w, mask, GROUP, log_z)
    assert metrics["log_z"] == pytest.approx(LOG_Z.mean().item())
    (gradient,) = torch.autograd.grad(loss, log_z)
    final = final_log_w(log_w, mask).detach()
    slow = [sum(2 * (LOG_Z[g] - final[g == GROUP])).item() / B for g in range(3)]
    assert gradient.tolist() == pytest.approx(slow)


@pytest.mark.parametrize("objective", [vargrad, forward_kl, partial(alpha_divergence, alpha=0.5)])
def test_group_objectives_need_two_samples(objective: Callable[..., Any]) -> None:
    log_w, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(DataError, match=r"num_samples must be at least 2"):
        objective(log_w, mask, torch.tensor([0, 0, 1]))


def categorical(drawn: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits of q = (1/2, 1/4, 1/4), p, final log_w of `drawn` for R = 7 p)."""
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().add(3.0).requires_grad_()
    p = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    index = torch.tensor(drawn)
    return logits, p, (7 * p).log()[index] - logits.log_softmax(0)[index]


def test_forward_kl_has_the_gradient_of_kl_p_q() -> None:
    """Each outcome as often as q has it: the weighted sum is then the expectation under p, with no noise."""
    logits, p, log_w = categorical([0, 0, 1, 2])
    loss, _ = forward_kl(log_w[:, None], torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.long))
    log_q = logits.log_softmax(0)
    kl_pq = (p * (p.log() - log_q)).sum()
    kl_qp = (log_q.exp() * (log_q - p.log())).sum()
    expected = torch.autograd.grad(kl_pq, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
    torch.testing.assert_close(loss, kl_pq + kl_qp)
    # The control: the other KL has another gradient.
    assert not torch.allclose(torch.autograd.grad(kl_qp, logits)[0], expected, atol=0.05)


def test_forward_kl_on_draws_of_p_is_maximum_likelihood() -> None:
    """Ten draws in the proportions of p; a group of draws of q beside it keeps its weights."""
    drawn = [0] * 2 + [1] * 7 + [2]
    logits, p, log_w = categorical([*drawn, 0, 0, 1, 2])
    group = torch.tensor([0] * 10 + [1] * 4)
    one_state = torch.ones(14, 1, dtype=torch.bool)
    loss, _ = forward_kl(log_w[:, None], one_state, group, torch.tensor([True, False]))
    kl_pq = (p * (p.log() - logits.log_softmax(0))).sum()
    expected = torch.autograd.grad(kl_pq, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
    alone, _ = forward_kl(log_w[10:, None], one_state[10:], group[10:] - 1)
    assert loss.item() == pytest.approx(alone.item() / 2), "draws of p count as 0 in the value"
    # The control: weighted again, as if they came from q, they are not.
    twice, _ = forward_kl(log_w[:, None], one_state, group)
    assert not torch.allclose(torch.autograd.grad(twice, logits)[0], expected, atol=0.05)


def renyi_gradient(logits: Tensor, p: Tensor, alpha: float) -> Tensor:
    """The gradient in the logits of q of log(sum p^alpha q^(1-alpha)) / (alpha - 1), by autograd."""
    log_q = logits.log_softmax(0)
    divergence = (alpha * p.log() + (1 - alpha) * log_q).logsumexp(0) / (alpha - 1)
    return torch.autograd.grad(divergence, logits)[0]


@pytest.mark.parametrize("alpha", [0.3, 0.8, 2.0])
def test_alpha_has_the_gradient_of_its_divergence(alpha: float) -> None:
    """Each outcome as often as q has it; the value is that of the docstring."""
    logits, p, log_w = categorical([0, 0, 1, 2])
    expected = renyi_gradient(logits, p, alpha) / alpha
    group, one_state = torch.zeros(4, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool)
    loss, _ = alpha_divergence(log_w[:, None], one_state, group, alpha)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
    log_q = logits.log_softmax(0)
    between = ((1 - alpha) * log_q + alpha * p.log()).softmax(0)
    both = ((between - log_q.exp()) * (between.log() - log_q)).sum()  # the two KL together
    torch.testing.assert_close(loss, both / alpha**2)
    # The control: another divergence.
    assert not torch.allclose(renyi_gradient(logits, p, alpha + 1) / alpha, expected, atol=0.02)


def test_alpha_leads_from_vargrad_to_forward_kl() -> None:
    """As alpha goes to 0: the gradient of the variance times (K - 1) / 2K, and with it that of KL(q || p)."""

    def slope(objective: Callable[..., Any], **settings: float) -> Tensor:
        logits, _, log_w = categorical([0, 0, 1, 2])
        loss, _ = objective(
            log_w[:, None], torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.long), **settings
        )
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(slope(alpha_divergence, alpha=1e-5), slope(vargrad) * 3 / 8, rtol=1e-3, atol=0)
    logits, p, _ = categorical([0])
    log_q = logits.log_softmax(0)
    kl_qp = (log_q.exp() * (log_q - p.log())).sum()
    torch.testing.assert_close(slope(vargrad) * 3 / 8, torch.autograd.grad(kl_qp, logits)[0])
    torch.testing.assert_close(slope(alpha_divergence, alpha=1.0), slope(forward_kl))
    assert not torch.allclose(slope(alpha_divergence, alpha=0.5), slope(forward_kl), atol=0.005)


def test_huber_bounds_the_gradient_of_a_pair_and_changes_nothing_below() -> None:
    log_w = torch.tensor([[0.0], [0.5], [40.0]], requires_grad=True)
    one_state, group = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    plain, clipped = (
        torch.autograd.grad(vargrad(log_w, one_state, group, huber)[0], log_w)[0] for huber in (None, 2.0)
    )
    assert plain.abs().max() > 20
    assert clipped.squeeze(1).tolist() == pytest.approx([(-0.5 - 2) / 3, (0.5 - 2) / 3, 4 / 3])
    torch.testing.assert_close(
        vargrad(log_w, one_state, group, 100.0)[0], vargrad(log_w, one_state, group)[0]
    )


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_rewards_that_are_not_finite_are_refused_with_the_remedy(bad: float) -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=True)
    outside = log_reward.masked_fill(~mask, bad)
    assert torch.isfinite(log_weights(outside, PolicyLogProbs(log_pf, log_pterm), mask)).all()
    inside = log_reward.clone()
    inside[0, 5] = bad
    with pytest.raises(RewardError, match="Softened to train on hard constraints"):
        log_weights(inside, PolicyLogProbs(log_pf, log_pterm), mask)


def test_subsampled_states_keep_the_last_and_at_most_k() -> None:
    _, _, _, mask = batch(gaps=True)
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros_like(mask)
    for _ in range(40):
        kept = subsample_states(mask, 2, generator)
        assert (kept <= mask).all()
        assert (kept.sum(1) == mask.sum(1).clamp(max=2)).all()
        for b in range(B):
            assert kept[b, stopping(mask[b])[-1]]
        seen |= kept
    assert (seen == mask).all(), "every state is drawn now and then"
    assert (subsample_states(mask, T + 1) == mask).all()
    assert (subsample_states(mask, 1).sum(1) == 1).all()


def test_subtb_on_a_subset_equals_the_formula_on_the_subset() -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=False)
    kept = subsample_states(mask, 3, torch.Generator().manual_seed(1))
    full = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    expected = slow_subtb(log_reward, log_pf, log_pterm, kept)
    torch.testing.assert_close(subtb(full, kept)[0], expected, atol=1e-6, rtol=1e-6)


def test_the_root_is_a_state_with_log_w_equal_to_log_z() -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=False)
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    rooted, states = with_root(log_w, mask, GROUP, LOG_Z)
    assert states[:, 0].all()
    assert (states[:, 1:] == mask[:, 1:]).all()
    for b in range(B):
        expected = log_w[b, 0] if mask[b, 0] else LOG_Z[GROUP[b]]
        assert rooted[b, 0] == expected
    torch.testing.assert_close(rooted[:, 1:], log_w[:, 1:])


def test_the_root_is_estimated_by_the_mean_final_weight_without_gradient() -> None:
    log_reward, log_pf, log_pterm, mask = batch(gaps=False)
    mask[:, 0] = False
    mask[4, 1] = True
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    rooted, _ = with_root(log_w, mask, GROUP)
    final = final_log_w(log_w, mask)
    for b in range(B):
        torch.testing.assert_close(rooted[b, 0], final[GROUP[b] == GROUP].mean())
    gradient = torch.autograd.grad(rooted[:, 0].sum(), log_pf, allow_unused=True)[0]
    assert gradient is None or not gradient.any()
