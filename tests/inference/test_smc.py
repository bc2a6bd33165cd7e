"""Sequential Monte Carlo: unbiased whatever the twists, against exact posteriors by enumeration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from reference import tiny_policy
from torch import Tensor

from amortlm import LanguageModel, Support, constraint, verifier
from amortlm.errors import ConfigError, DataError, RewardError
from amortlm.inference import smc as module
from amortlm.inference.exact import enumerate_posterior
from amortlm.inference.smc import smc, twists
from amortlm.policy import Policy
from amortlm.targets.base import Target
from amortlm.weights import systematic

ROW = {"x": "the dog", "y": " ran"}
TOKENS = (" a", " cat", "s")
RUNS, PARTICLES = 100, 8
SIGMAS = 5.6  # two-sided tail 2e-8, below LEVEL


def calm(lm: LanguageModel) -> LanguageModel:
    """The model with smaller weights: a posterior that is spread out."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.data *= 0.7
    return LanguageModel(model, lm.tokenizer)


def support(low: int = 0, high: int = 3) -> Support:
    return Support(stop=(".", "!"), min_tokens=low, max_tokens=high, allowed_tokens=TOKENS)


def infilling(lm: LanguageModel) -> Target:
    return lm.log_prob("{z}{y}", given="{x}")


def finished(texts: list[str], rows: list[dict[str, str]]) -> list[float]:
    """Judges finished text only, R = 0 unless it has an s."""
    return [-0.7 * len(text) if "s" in text else -math.inf for text in texts]


def parts(z: list[int]) -> set[str]:
    """The events whose probability is estimated: everything, its length, its first token."""
    return {"all", f"length {len(z)}", f"first {z[0] if z else None}"}


def errors(
    policy: Policy, target: Target, threshold: float, runs: int = RUNS, particles: int = PARTICLES
) -> tuple[Tensor, int]:
    """z-scores, over seeded runs, of weighted masses against Z times exact probabilities (that of "all" is Z-hat
    against Z), and how often particles were resampled."""
    exact = enumerate_posterior(target, policy.support, ROW)
    expected: dict[str, float] = {}
    for z, p in zip(exact.completions, exact.log_p.exp().tolist(), strict=True):
        for name in parts(z):
            expected[name] = expected.get(name, 0.0) + p
    names = [name for name, p in expected.items() if p > 1e-3]
    sample, resamplings = torch.zeros(runs, len(names), dtype=torch.float64), 0
    for seed in range(runs):
        got = smc(policy, target, ROW, num_particles=particles, seed=seed, ess_threshold=threshold)
        weights = ((got.log_weights - exact.log_z).exp() / particles).tolist()
        assert math.exp(got.log_z - exact.log_z) == pytest.approx(sum(weights))
        for z, w in zip(got.rollouts.completions(), weights, strict=True):
            for name in parts(z) & set(names):
                sample[seed, names.index(name)] += w
        resamplings += len(got.resampled_at)
    error = sample.std(0) / math.sqrt(runs)
    return (sample.mean(0) - torch.tensor([expected[name] for name in names]).double()) / error, resamplings


TARGETS: dict[str, Callable[[LanguageModel], Target]] = {
    "infilling": infilling,
    "tempered": lambda lm: infilling(lm) / 3,
    "finished": lambda lm: lm.log_prob("{z}", given="{x}") / 2 + verifier(finished),
    "hard": lambda lm: infilling(lm) / 3 + constraint.contains("cat"),
}


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("name", "low", "threshold"),
    [
        pytest.param("tempered", 0, 1.0, marks=LONG),
        ("infilling", 2, 1.0),
        ("infilling", 0, 0.0),
        ("finished", 0, 0.9),
        pytest.param("hard", 1, 0.9, marks=LONG),
    ],
)
def test_estimates_are_unbiased(one_lm: LanguageModel, name: str, low: int, threshold: float) -> None:
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", support(low))
    scores, resamplings = errors(policy, TARGETS[name](lm), threshold)
    assert scores.abs().max() < SIGMAS
    assert (resamplings > RUNS / 4) == (threshold > 0)


def not_divided_out(log_c: Tensor, log_twist: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    log_value = log_c + log_twist
    ancestors = systematic(log_value, len(log_value), u)
    return ancestors, log_c[ancestors]


def test_twists_that_are_not_divided_out_are_told_apart(
    one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", support(2))
    monkeypatch.setattr(module, "resampled", not_divided_out)
    assert errors(policy, infilling(lm), 1.0)[0].abs().max() > SIGMAS


def test_at_the_optimum_nothing_is_resampled(one_lm: LanguageModel) -> None:
    """R = p on all of its tokens, q = p: below max_tokens every state of every particle has weight one."""
    stops = (".", "!", "?", ",")
    choices = [i for i in range(one_lm.vocab_size) if i not in map(one_lm.token_id, stops)]
    policy = Policy(one_lm, "{x}", Support(stop=stops, min_tokens=0, max_tokens=3, allowed_tokens=choices))
    target = one_lm.log_prob("{z}", given="{x}")
    got = smc(policy, target, ROW, num_particles=64, seed=0, ess_threshold=0.99)
    assert got.resampled_at == []
    assert got.ess[:2] == pytest.approx([64.0, 64.0], abs=1e-3)


def test_systematic_counts() -> None:
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2]).double()
    for u in (0.0, 0.3, 0.999):
        counts = torch.bincount(systematic(weights.log(), 7, torch.tensor(u).double()), minlength=4)
        assert ((counts - 7 * weights).abs() < 1).all()
        assert counts[1] == 0


def test_twists_by_hand() -> None:
    """Stopped: own w, zero included. Live: half of w[t], half the mean of what is known; unknown: this mean."""
    log_w = torch.full((4, 4), -torch.inf).double()
    log_w[0, 1] = math.log(3.0)  # stopped at 1
    log_w[2, 2] = math.log(6.0)  # live at 2, R > 0
    lengths = torch.tensor(
        [1, 1, 3, 2]
    )  # particle 1 stopped with R = 0, particle 3 is live with R = 0 so far
    equal = torch.zeros(4).double()
    expected = torch.tensor([3.0, 0.0, 4.5, 3.0]).double()
    torch.testing.assert_close(twists(log_w, equal, lengths, 2).exp(), expected)
    log_c = torch.tensor([1.0, 1.0, 2.0, 5.0]).double().log()
    expected = torch.tensor([3.0, 0.0, 3.0 + 15 / 8, 15 / 4]).double()
    torch.testing.assert_close(twists(log_w, log_c, lengths, 2).exp(), expected)
    nothing = twists(torch.full((2, 4), -torch.inf).double(), equal[:2], torch.tensor([1, 3]), 2)
    assert nothing.tolist() == [-math.inf, 0.0]
    # Finished completions alone: that particle 2 will stop at 2 is not known yet.
    expected = torch.tensor([3.0, 0.0, 1.5, 1.5]).double()
    torch.testing.assert_close(twists(log_w, equal, lengths, 2, every_state=False).exp(), expected)


def test_a_stop_that_is_drawn_but_not_reached_decides_nothing(one_lm: LanguageModel) -> None:
    """A target of finished text that favours short ones. Where their drawn stops are seen too early, whether particles
    are resampled depends on them, and the law of lengths is off by five standard errors here."""
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", support())
    short = verifier(lambda texts, rows: [3.0 if len(text) <= 3 else 0.0 for text in texts]).bind(lm)
    z, resamplings = errors(policy, short, 0.8, runs=600, particles=3)
    assert resamplings > 0
    assert z.abs().max() < 4.5  # two-sided tail 7e-6 each; a fixed seed


def test_shapes_counts_and_seed(one_lm: LanguageModel) -> None:
    lm = calm(one_lm)
    policy, target = tiny_policy(lm, "{x}", support(0, 4)), infilling(lm)

    def run(seed: object, threshold: float = 1.0) -> module.Particles:
        return smc(policy, target, ROW, num_particles=16, seed=seed, ess_threshold=threshold)

    got = run(("a", 1))
    assert got.resampled_at
    assert got.log_weights.shape == got.log_reward.shape == (16,)
    assert all(0 < e <= 16 + 1e-6 for e in got.ess)
    expected = target.score_final(got.rollouts).double()
    torch.testing.assert_close(got.log_reward, expected, atol=1e-4, rtol=0)
    log_q = policy.evaluate(got.rollouts).final(got.rollouts.lengths).double().detach()
    torch.testing.assert_close(got.log_q, log_q, atol=1e-4, rtol=0)
    assert got.completions_scored > 16
    assert run(("a", 1)).rollouts.completions() == got.rollouts.completions()
    assert torch.equal(run(("a", 1)).log_weights, got.log_weights)
    assert run(("a", 2)).rollouts.completions() != got.rollouts.completions()
    plain = run(0, 0.0)
    assert plain.resampled_at == []
    assert len(plain.ess) == 1
    assert plain.completions_scored == 16
    assert plain.tokens_decoded == int((plain.rollouts.lengths + 1).sum())
    torch.testing.assert_close(plain.log_weights, plain.log_reward - plain.log_q)


def test_all_dead_particles_estimate_zero(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", support())
    target = one_lm.log_prob("{z}") + constraint.contains("dog")
    got = smc(policy, target, ROW, num_particles=8, seed=0)
    assert got.log_z == -math.inf
    assert got.ess[-1] == 0.0
    assert not torch.isnan(got.log_weights).any()
    with pytest.raises(RewardError, match="all 8 completions drawn have R = 0"):
        got.resample(4, seed=0)


def test_errors_say_what_to_do(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support()), infilling(one_lm)
    for bad in ({"num_particles": 0}, {"num_particles": 4, "ess_threshold": 1.5}):
        with pytest.raises(ConfigError, match="at least one particle and a threshold from 0"):
            smc(policy, target, ROW, seed=0, **bad)
    with pytest.raises(DataError, match="no column 'y'"):
        smc(policy, target, {"x": "a"}, num_particles=2, seed=0)
    object.__setattr__(policy.support, "tool", object())
    with pytest.raises(ConfigError, match="without a tool"):
        smc(policy, target, ROW, num_particles=2, seed=0)
