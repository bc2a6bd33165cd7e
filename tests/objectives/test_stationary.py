"""Where q stays: the expected gradient of each objective for an unrestricted q over a few completions, without noise.

Every group of K draws of a behaviour is enumerated, so an expectation is a sum. The behaviour is q itself (which then
changes with q), or another distribution that never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from amortlm.objectives import alpha_divergence, forward_kl, prefix_tb, tb, vargrad

LOG_R = torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=torch.float64)
P = LOG_R.softmax(0)
OTHER = torch.tensor([0.5, 0.2, 0.1, 0.2], dtype=torch.float64)  # a behaviour that is neither q nor p
START = torch.tensor([0.0, 2.5, -1.0, 1.0], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, float]]]
COMPARING: dict[str, Loss] = {
    "vargrad": vargrad,
    "huber 0.5": partial(vargrad, huber=0.5),
    "prefix_tb": prefix_tb,
    "forward_kl": forward_kl,
    "alpha 0.25": partial(alpha_divergence, alpha=0.25),
    "alpha 2": partial(alpha_divergence, alpha=2.0),
}


def gradient(
    loss: Loss, logits: Tensor, behaviour: Tensor | None, k: int, log_r: Tensor = LOG_R
) -> tuple[Tensor, Tensor]:
    """(expected gradient in the logits of q [n], log weights of the completions [n]); behaviour None: q itself."""
    n, log_q = len(log_r), logits.log_softmax(0)
    groups = torch.tensor(list(product(range(n), repeat=k)))
    chance = (log_q.exp() if behaviour is None else behaviour)[groups].prod(1)
    drawn = (log_r - log_q)[groups].flatten().requires_grad_()
    group = torch.arange(len(groups)).repeat_interleave(k)
    value, _ = loss(drawn[:, None], torch.ones(len(drawn), 1, dtype=torch.bool), group)
    # The loss is the mean over groups, each of which sees its own draws alone.
    (slope,) = torch.autograd.grad(value * len(groups), drawn)
    pull = slope.new_zeros(n).index_add(0, groups.flatten(), slope * chance.repeat_interleave(k))
    return log_q.exp() * pull.sum() - pull, log_r - log_q


def descend(
    loss: Loss, behaviour: Tensor | None, k: int, steps: int = 400, log_r: Tensor = LOG_R
) -> tuple[Tensor, list[float]]:
    """(q, the range of the log weights before each step) of gradient descent from START."""
    logits, ranges = START.clone(), []
    for _ in range(steps):
        slope, log_w = gradient(loss, logits, behaviour, k, log_r)
        ranges.append((log_w.max() - log_w.min()).item())
        logits -= slope
    return logits.softmax(0), ranges


def total_variation(q: Tensor, p: Tensor) -> float:
    return (q - p).abs().sum().item() / 2


@pytest.mark.parametrize("behaviour", [None, OTHER], ids=["draws of q", "other draws"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", COMPARING)
def test_objectives_that_compare_a_group_stay_at_the_posterior_alone(
    name: str, k: int, behaviour: Tensor | None
) -> None:
    """From the mathematics: in each group the pulls on log_w sum to zero, that of the largest log_w is never negative,
    and it is zero only if all are equal. So the range of the log weights falls until q = R / Z, for any behaviour."""
    slope, _ = gradient(COMPARING[name], LOG_R + 3.0, behaviour, k)
    assert slope.abs().max() < 1e-12
    assert gradient(COMPARING[name], START, behaviour, k)[0].abs().max() > 0.01
    q, ranges = descend(COMPARING[name], behaviour, k)
    assert total_variation(START.softmax(0), P) > 0.5
    assert total_variation(q, P) < 1e-3
    assert all(later < earlier + 1e-9 for earlier, later in pairwise(ranges))


def test_pairs_left_out_because_of_their_rewards_move_the_optimum() -> None:
    """Why `vargrad` shortens large differences and leaves none out: without the pairs of nearly equal rewards, nothing
    tells completions of equal reward apart (the control of the test above)."""

    def pruned(log_w: Tensor, mask: Tensor, group: Tensor) -> tuple[Tensor, dict[str, float]]:
        outcome = torch.tensor(list(product(range(4), repeat=2))).flatten()
        apart = (level[outcome].view(-1, 2).diff(dim=1).abs() > 0.5).repeat_interleave(2)
        return vargrad(torch.where(apart[:, None], log_w, 0.0), mask, group)

    level = torch.zeros(4, dtype=torch.float64)
    q, _ = descend(pruned, OTHER, 2, log_r=level)
    assert total_variation(q, START.softmax(0)) == 0  # it never moves
    q, _ = descend(vargrad, OTHER, 2, log_r=level)
    assert total_variation(q, level.softmax(0)) < 1e-3


# log Z estimated once, and fixed. d: its error in nats


def fixed(d: float) -> Loss:
    log_z = LOG_R.logsumexp(0) + d
    return lambda log_w, mask, group: tb(log_w, mask, group, log_z.expand(int(group.max()) + 1))


@pytest.mark.parametrize("d", [-1.0, 0.0, 0.7])
def test_an_error_of_a_fixed_log_z_is_a_baseline_on_draws_of_q(d: float) -> None:
    """E_q[grad log q] = 0, so a constant in the residual has no expected gradient: q still goes to R / Z. In a single
    draw it is noise."""
    assert gradient(fixed(d), LOG_R, None, 1)[0].abs().max() < 1e-12
    assert total_variation(descend(fixed(d), None, 1)[0], P) < 1e-3
    final = LOG_R.log_softmax(0).requires_grad_()
    one = (LOG_R - final)[:1]
    group = torch.zeros(1, dtype=torch.long)
    loss, _ = fixed(d)(one[:, None], torch.ones(1, 1, dtype=torch.bool), group)
    assert torch.autograd.grad(loss, final)[0][0].item() == pytest.approx(2 * d)


@pytest.mark.parametrize("d", [-1.0, 0.0, 0.7])
def test_an_error_of_a_fixed_log_z_moves_the_optimum_of_other_draws(d: float) -> None:
    """At q = R / Z the gradient is 2 d (mu - p) for draws of mu. q ends where log(p / q) - d = c q / mu for a constant
    c, and that is not proportional to R."""
    slope, _ = gradient(fixed(d), LOG_R, OTHER, 1)
    torch.testing.assert_close(slope, 2 * d * (OTHER - P), atol=1e-12, rtol=0)
    q, _ = descend(fixed(d), OTHER, 1, steps=1500)
    c = ((P / q).log() - d) * OTHER / q
    torch.testing.assert_close(c, c.mean().expand(4), atol=1e-3, rtol=0)
    if d == 0:
        assert total_variation(q, P) < 1e-3
    else:
        assert total_variation(q, P) > 0.05
        assert c.mean().sign() == -math.copysign(1, d)


# The length-normalised residual of FlowRL (Zhu et al. 2025), log_w / length - c with a learned c


def tilted(log_r: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """(R exp(-c length), c) with the c for which it sums to one: the sum falls as c rises."""
    low, high = -50.0, 50.0
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if (log_r - c * lengths).logsumexp(0) > 0 else (low, c)
    return (log_r - c * lengths).exp(), c


def per_token(log_q: Tensor, log_r: Tensor, lengths: Tensor) -> float:
    """The least mean squared residual over c, each completion once: zero only if every log_w / length is the same."""
    return ((log_r - log_q) / lengths).var(unbiased=False).item()


def test_balance_per_token_samples_another_distribution() -> None:
    """Its residuals are zero at q = R exp(-c length), which prefers lengths and changes with the scale of R. So it is no
    objective here; whoever wants that distribution can state it as a target."""
    lengths = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    q, c = tilted(LOG_R, lengths)
    assert q.sum().item() == pytest.approx(1.0)
    assert per_token(q.log(), LOG_R, lengths) < 1e-20
    assert per_token(P.log(), LOG_R, lengths) > 0.1
    assert total_variation(q, P) > 0.1
    scaled, _ = tilted(LOG_R + 3.0, lengths)  # the same posterior
    assert total_variation(scaled, q) > 0.1
    # It is the posterior if all lengths are equal, or if Z happens to be one.
    assert total_variation(tilted(LOG_R, torch.full_like(lengths, 3.0))[0], P) < 1e-9
    same, c = tilted(P.log(), lengths)
    assert total_variation(same, P) < 1e-9
    assert abs(c) < 1e-9
