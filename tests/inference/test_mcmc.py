"""Metropolis-Hastings against exact posteriors by enumeration."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test

from amortlm import LanguageModel, Support, constraint, verifier
from amortlm.engine.decoding import Draws
from amortlm.errors import ConfigError, DataError
from amortlm.inference import mcmc
from amortlm.inference.exact import ExactPosterior, enumerate_posterior
from amortlm.inference.mcmc import Chains, metropolis_hastings
from amortlm.inference.paths import paths_of, prepare, redraw, rollouts_of, sample_paths
from amortlm.policy import Policy
from amortlm.targets.base import Target

ROW = {"x": "the dog", "y": " ran"}
TOKENS = (" a", " cat", "s")
CHAINS, STEPS = 1500, 12


def support(low: int = 0, high: int = 3) -> Support:
    return Support(stop=(".", "!"), min_tokens=low, max_tokens=high, allowed_tokens=TOKENS)


def calm(lm: LanguageModel) -> LanguageModel:
    """The model with smaller weights: a posterior that is spread out, chains that forget where they began."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.data *= 0.5
    return LanguageModel(model, lm.tokenizer)


def infilling(lm: LanguageModel) -> Target:
    """Tempered, or the empty completion would have nearly all the mass."""
    return lm.log_prob("{z}{y}", given="{x}") / 3


def short_and_finished(texts: list[str], rows: list[dict[str, str]]) -> list[float]:
    """Judges finished text only: R = 0 for the empty one."""
    return [-0.7 * len(text) if text else -math.inf for text in texts]


def agreement(chains: Chains, exact: ExactPosterior) -> float:
    """p-value of the last completions under the exact posterior."""
    counts = Counter(map(tuple, chains.rollouts.completions()))
    possible = torch.isfinite(exact.log_p)
    observed = torch.tensor([counts[tuple(z)] for z in exact.completions])
    assert observed.sum() == len(chains.rollouts), "every completion is in the support"
    assert observed[~possible].sum() == 0, "R = 0"
    return g_test(observed[possible], exact.log_p.exp()[possible])


def run(policy: Policy, target: Target, **changes: int) -> Chains:
    counts = {"num_chains": CHAINS, "num_steps": STEPS} | changes
    return metropolis_hastings(policy, target, ROW, **counts, seed=1)


@pytest.mark.parametrize(("name", "low"), [("llama-untied", 0), ("gpt2-tied", 2)])
def test_infilling_agrees_with_the_exact_posterior(
    models: dict[str, LanguageModel], name: str, low: int
) -> None:
    lm = calm(models[name])
    policy, target = tiny_policy(lm, "{x}", support(low)), infilling(lm)
    exact = enumerate_posterior(target, policy.support, ROW)
    assert agreement(run(policy, target), exact) > LEVEL
    assert agreement(run(policy, target, num_steps=0), exact) < LEVEL, "the policy alone is told apart"


def test_other_targets_agree_too(one_lm: LanguageModel) -> None:
    """Tempered continuation; finished text only; a hard constraint that many draws fail."""
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", support())
    p = lm.log_prob("{z}", given="{x}") / 2
    for target in (p, p + verifier(short_and_finished), p + constraint.contains("cat")):
        exact = enumerate_posterior(target, policy.support, ROW)
        assert agreement(run(policy, target, num_steps=60, num_chains=1000), exact) > LEVEL


def without_cut(current: Draws, log_r: torch.Tensor, proposed: Draws, new: torch.Tensor) -> torch.Tensor:
    return (new - proposed.log_q) - (log_r - current.log_q)


def without_q(current: Draws, log_r: torch.Tensor, proposed: Draws, new: torch.Tensor) -> torch.Tensor:
    return new - log_r + (current.lengths + 1).log() - (proposed.lengths + 1).log()


@pytest.mark.parametrize("wrong", [without_cut, without_q])
def test_a_wrong_acceptance_ratio_is_told_apart(
    one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, wrong: object
) -> None:
    lm = calm(one_lm)
    policy, target = tiny_policy(lm, "{x}", support()), infilling(lm)
    exact = enumerate_posterior(target, policy.support, ROW)
    monkeypatch.setattr(mcmc, "acceptance_log_ratio", wrong)
    assert agreement(run(policy, target), exact) < LEVEL


@pytest.mark.parametrize("x", ["", "the dog ran, the cat"])
def test_redraw_keeps_the_prefix_and_knows_its_log_q(lm: LanguageModel, x: str) -> None:
    """Whatever the model, at prefixes of every length in one batch, after a prompt of one token too."""
    lm, row = calm(lm), {"x": x, "y": " ran"}
    policy = tiny_policy(lm, "{x}", support(1, 4)).train()
    _, prefix = prepare(policy, infilling(lm), row)
    generator = torch.Generator().manual_seed(0)
    paths, drawn = sample_paths(policy, prefix, 64, generator)
    assert drawn == int((paths.lengths + 1).sum())
    keep = torch.arange(64) % (paths.lengths + 1)
    assert set(keep.tolist()) == {0, 1, 2, 3, 4}
    new = redraw(policy, prefix, paths, keep, generator)
    assert policy.training, "left as it was found"
    rollouts = rollouts_of(new, policy, row)
    assert (new.lengths >= keep).all()
    for old, z, k in zip(
        rollouts_of(paths, policy, row).completions(), rollouts.completions(), keep.tolist(), strict=True
    ):
        assert z[:k] == old[:k]
        assert policy.support.contains(z)
    assert rollouts.completions() != rollouts_of(paths, policy, row).completions()
    assert torch.isin(new.stops, torch.tensor(policy.support.stop_ids)).all()
    log_probs = policy.evaluate(rollouts)
    width = rollouts.tokens.shape[1]
    torch.testing.assert_close(new.log_pf[:, :width], log_probs.log_pf, atol=1e-4, rtol=0)
    reached = rollouts.stop_mask
    torch.testing.assert_close(
        new.log_pterm[:, : width + 1][reached], log_probs.log_pterm[reached], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(new.log_q.float(), log_probs.final(rollouts.lengths), atol=1e-4, rtol=0)


def test_redrawn_suffixes_follow_the_policy(one_lm: LanguageModel) -> None:
    """q(z' | z_1:1) by enumeration."""
    policy = tiny_policy(one_lm, "{x}", support(0, 3))
    _, prefix = prepare(policy, infilling(one_lm), ROW)
    first = one_lm.token_id(" cat")
    given = policy.rollouts([ROW], [[[first]]])
    paths = paths_of(policy, ROW, given, 1).select(torch.zeros(4000, dtype=torch.long))
    new = redraw(policy, prefix, paths, torch.ones(4000, dtype=torch.long), torch.Generator().manual_seed(5))
    strings = [z for n in range(1, 4) for z in policy.support.completions(n) if z[0] == first]
    rollouts = policy.rollouts([ROW], [strings])
    log_q = policy.evaluate(rollouts).final(rollouts.lengths).detach()
    counts = Counter(map(tuple, rollouts_of(new, policy, ROW).completions()))
    assert g_test(torch.tensor([counts[tuple(z)] for z in strings]), log_q.exp()) > LEVEL
    assert g_test(torch.tensor([counts[tuple(z)] for z in strings]), (log_q / 0.7).exp()) < LEVEL


def test_shapes_counts_and_trace(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support(1)), infilling(one_lm)
    chains = run(policy, target, num_chains=7, num_steps=5)
    assert len(chains.rollouts) == 7
    assert chains.trace.shape == (7, 6)
    assert chains.accepted.shape == (7, 5)
    assert 0 < chains.acceptance_rate <= 1
    assert chains.completions_scored == 42
    assert 7 * (2 + 5) <= chains.tokens_decoded <= 7 * (4 + 5 * 4)
    torch.testing.assert_close(chains.trace[:, -1], chains.log_reward)
    expected = target.score_final(chains.rollouts).double()
    torch.testing.assert_close(chains.log_reward, expected, atol=1e-4, rtol=0)
    log_q = policy.evaluate(chains.rollouts).final(chains.rollouts.lengths).double()
    torch.testing.assert_close(chains.log_q, log_q.detach(), atol=1e-4, rtol=0)
    stayed = ~chains.accepted
    torch.testing.assert_close(chains.trace[:, 1:][stayed], chains.trace[:, :-1][stayed], atol=0, rtol=0)


def test_the_seed_decides(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support()), infilling(one_lm)

    def last(seed: object) -> list[list[int]]:
        chains = metropolis_hastings(policy, target, ROW, num_chains=20, num_steps=3, seed=seed)
        return chains.rollouts.completions()

    torch.rand(3)
    assert last(("a", 1)) == last(("a", 1))
    assert last(("a", 1)) != last(("a", 2))


def test_chains_start_where_they_are_told(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support()), infilling(one_lm)
    initial = policy.rollouts([ROW], [[" cat.", " a cats!", ""]])
    kept = metropolis_hastings(policy, target, ROW, num_chains=3, num_steps=0, seed=0, initial=initial)
    assert kept.rollouts.completions() == initial.completions()
    assert kept.rollouts.stops.tolist() == initial.stops.tolist()
    assert math.isnan(kept.acceptance_rate)
    again = metropolis_hastings(policy, target, ROW, num_chains=3, num_steps=4, seed=0, initial=kept.rollouts)
    torch.testing.assert_close(again.trace[:, 0], kept.log_reward, atol=1e-4, rtol=0)


def test_from_zero_reward_chains_find_the_posterior_and_stay(one_lm: LanguageModel) -> None:
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", support())
    target = lm.log_prob("{z}", given="{x}") + constraint.contains("cats")
    initial = policy.rollouts([ROW], [[" a"] * 40])
    chains = metropolis_hastings(policy, target, ROW, num_chains=40, num_steps=80, seed=3, initial=initial)
    found = torch.isfinite(chains.trace)
    assert not found[:, 0].any()
    assert found[:, -1].all()
    assert (found[:, 1:] >= found[:, :-1]).all(), "never back to R = 0"


def test_an_impossible_target_gives_minus_infinity(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", support())
    chains = run(policy, constraint.contains("dog"), num_chains=5, num_steps=3)
    assert torch.isneginf(chains.trace).all()
    assert torch.isfinite(chains.log_q).all()


def test_errors_say_what_to_do(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support(1)), infilling(one_lm)
    with pytest.raises(ConfigError, match="at least one chain"):
        run(policy, target, num_chains=0)
    with pytest.raises(ConfigError, match="num_steps=-1"):
        run(policy, target, num_steps=-1)
    with pytest.raises(DataError, match="no column 'y'"):
        metropolis_hastings(policy, target, {"x": "a"}, num_chains=1, num_steps=1, seed=0)
    initial = policy.rollouts([ROW], [[" cat", " a"]])
    with pytest.raises(DataError, match="2 completions for 3 chains"):
        metropolis_hastings(policy, target, ROW, num_chains=3, num_steps=1, seed=0, initial=initial)
    wide = tiny_policy(one_lm, "{x}", support(0, 5)).rollouts([ROW], [[""]])
    with pytest.raises(DataError, match="outside the support"):
        metropolis_hastings(policy, target, ROW, num_chains=1, num_steps=1, seed=0, initial=wide)


def test_supports_with_a_tool_are_refused(one_lm: LanguageModel) -> None:
    policy, target = tiny_policy(one_lm, "{x}", support()), infilling(one_lm)
    object.__setattr__(policy.support, "tool", object())
    with pytest.raises(ConfigError, match="without a tool"):
        run(policy, target)
