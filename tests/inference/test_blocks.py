"""Block-wise Metropolis-Hastings against exact posteriors and exact laws of its blocks, by enumeration."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test

from amortlm import LanguageModel, Policy, Posterior, Support, constraint, tempered, verifier
from amortlm.errors import ConfigError
from amortlm.inference import blocks
from amortlm.inference.blocks import _Walk, blockwise_metropolis_hastings, log_ratio
from amortlm.inference.exact import ExactPosterior, enumerate_posterior, policy_log_probs
from amortlm.inference.mcmc import Chains
from amortlm.inference.paths import prepare, rollouts_of
from amortlm.rollout import wire
from amortlm.targets.base import Target

ROW = {"x": "the dog", "y": " ran"}
TOKENS = (" a", " cat", "s")
CHAINS = 1000


def calm(lm: LanguageModel) -> LanguageModel:
    """The model with smaller weights: posteriors that are spread out."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.data *= 0.35
    return LanguageModel(model, lm.tokenizer)


def support(low: int = 0, high: int = 3) -> Support:
    return Support(stop=".", min_tokens=low, max_tokens=high, allowed_tokens=TOKENS)


def power(lm: LanguageModel, a: float, low: int = 0, high: int = 3) -> tuple[Policy, Target]:
    """p^a, and the proposal of the paper."""
    base = Policy(lm, "{x}", support(low, high)).prior
    return tempered(base, 1 / a), a * lm.log_prob("{z}", given="{x}")


def run(policy: Policy, target: Target, steps: int, block: int = 1, chains: int = CHAINS) -> Chains:
    return blockwise_metropolis_hastings(
        policy, target, ROW, num_chains=chains, block_tokens=block, num_steps=steps, seed=1
    )


def counted(chains: Chains, exact: ExactPosterior) -> torch.Tensor:
    counts = Counter(map(tuple, chains.rollouts.completions()))
    found = torch.tensor([counts[tuple(z)] for z in exact.completions])
    assert found.sum() == len(chains.rollouts), "every completion is in the support"
    return found


def agreement(chains: Chains, exact: ExactPosterior) -> float:
    """p-value of the last completions under the exact posterior."""
    possible, found = torch.isfinite(exact.log_p), counted(chains, exact)
    assert found[~possible].sum() == 0, "R = 0"
    return g_test(found[possible], exact.log_p.exp()[possible])


def distance(chains: Chains, exact: ExactPosterior) -> float:
    return 0.5 * (counted(chains, exact) / len(chains.rollouts) - exact.log_p.exp()).abs().sum().item()


@pytest.mark.parametrize(("low", "block"), [(1, 1), (2, 2), (1, 3)])
def test_a_power_posterior_with_the_published_proposal(one_lm: LanguageModel, low: int, block: int) -> None:
    """The total variation falls to what so many exact draws have; control: low temperature alone."""
    policy, target = power(calm(one_lm), 3.0, low)
    exact = enumerate_posterior(target, policy.support, ROW)
    long = run(policy, target, 50, block)
    assert agreement(long, exact) > LEVEL
    plain = run(policy, target, 0, block)
    assert agreement(plain, exact) < LEVEL, "a low temperature is not a power"
    assert distance(long, exact) < distance(plain, exact) / 2


@pytest.mark.slow
def test_other_policies_and_targets(one_lm: LanguageModel) -> None:
    """A policy unlike the model; infilling; a hard constraint; a target that judges finished text only; several stop
    symbols; a list, where a text cannot stop everywhere."""
    lm = calm(one_lm)
    p = lm.log_prob("{z}", given="{x}") / 2

    def lengths(texts: list[str], rows: list[dict[str, str]]) -> list[float]:
        return [-0.3 * len(text) if text else -math.inf for text in texts]

    several = Support(stop=(".", "!"), min_tokens=0, max_tokens=3, allowed_tokens=TOKENS)
    lists = Support(
        stop=".", separator=",", min_statements=2, max_statements=2, max_tokens=4, allowed_tokens=TOKENS
    )
    cases = [
        (several, lm.log_prob("{z}{y}", given="{x}") / 3),
        (support(), p + constraint.contains("cat")),
        (support(), p + verifier(lengths)),
        (lists, p),
    ]
    for spec, target in cases:
        policy = tiny_policy(lm, "{x}", spec)
        exact = enumerate_posterior(target, policy.support, ROW)
        assert agreement(run(policy, target, 30), exact) > LEVEL


def walked(policy: Policy, target: Target, end: int, steps: int, count: int) -> _Walk:
    bound, prefix = prepare(policy, target, ROW)
    walk = _Walk(policy, bound, ROW, prefix, torch.Generator().manual_seed(0))
    walk.begin(count)
    walk.lengthen(end)
    for _ in range(steps):
        walk.step()
    return walk


def test_a_block_targets_the_power_of_its_texts(one_lm: LanguageModel) -> None:
    """Texts of two tokens that have not stopped have p(z_1:2)^a, as published; finished ones p(z stop)^a."""
    a = 3.0
    policy, target = power(calm(one_lm), a, low=1, high=4)
    walk = walked(policy, target, 2, 30, 2000)
    short = [z for n in (1, 2) for z in policy.support.completions(n)]
    rollouts = policy.rollouts([ROW], [short])
    final = policy.lm.log_prob("{z}", given="{x}").score_final(rollouts).double()
    stop = torch.tensor([log_stop(policy, z) for z in short])
    log_p = a * torch.where(torch.tensor([len(z) == 2 for z in short]), final - stop, final)
    counts = Counter(map(tuple, rollouts_of(walk.texts, policy, ROW).completions()))
    observed = torch.tensor([counts[tuple(z)] for z in short])
    assert g_test(observed, log_p.softmax(0)) > LEVEL
    assert g_test(observed, (a * final).softmax(0)) < LEVEL, "not of texts that stop at two tokens"


@torch.no_grad()
def log_stop(policy: Policy, z: list[int]) -> float:
    """log p(stop | z), p not renormalised on the support."""
    ids = torch.tensor([[*policy.encode_rows([ROW])[0], *z]])
    logits = policy.lm.model(input_ids=ids).logits[0, -1].double()
    return logits.log_softmax(-1)[policy.support.stop_ids[0]].item()


@pytest.mark.parametrize("wrong", ["lengths", "weights"])
def test_a_wrong_acceptance_ratio_is_told_apart(
    one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    policy, target = power(calm(one_lm), 3.0, low=1)
    exact = enumerate_posterior(target, policy.support, ROW)
    if wrong == "lengths":
        monkeypatch.setattr(blocks, "cut_log_ratio", lambda old, new: 0.0 * old)
    else:
        monkeypatch.setattr(blocks, "log_ratio", lambda old, new: log_ratio(old / 3, new / 3))
    assert agreement(run(policy, target, 15, chains=2500), exact) < LEVEL


def test_counts_and_trace(one_lm: LanguageModel) -> None:
    policy, target = power(calm(one_lm), 2.0, low=1, high=5)
    chains = run(policy, target, steps=3, block=2, chains=7)
    assert chains.accepted.shape == (7, 3)
    assert chains.trace.shape == (7, 4)
    assert (
        chains.completions_scored == 7 * 3 * 4
    )  # three blocks, each scored when it is written and after each step
    assert 7 * (1 + 3 * 3) <= chains.tokens_decoded <= 7 * (5 + 3 * (2 + 4 + 5))
    torch.testing.assert_close(chains.log_reward, chains.trace[:, -1])
    expected = target.score_final(chains.rollouts).double()
    torch.testing.assert_close(chains.log_reward, expected, atol=1e-3, rtol=0)
    log_q = policy.evaluate(chains.rollouts).final(chains.rollouts.lengths).double()
    torch.testing.assert_close(chains.log_q, log_q.detach(), atol=1e-3, rtol=0)
    assert run(policy, target, 3, 2, 7).rollouts.completions() == chains.rollouts.completions()
    assert run(policy, target, 0, 2, 7).accepted.shape == (7, 0)


def test_zero_is_left_and_never_entered() -> None:
    inf, nan = math.inf, math.nan
    old, new = torch.tensor([0.0, -inf, -inf, nan, 1.0, nan]), torch.tensor([-inf, 0.0, -inf, 1.0, nan, -inf])
    assert log_ratio(old, new).tolist() == [-inf, inf, inf, 0.0, 0.0, -inf]


def test_errors_say_what_to_do(one_lm: LanguageModel) -> None:
    policy, target = power(one_lm, 2.0)
    for wrong in ({"steps": -1}, {"steps": 1, "block": 0}, {"steps": 1, "chains": 0}):
        with pytest.raises(ConfigError, match="at least one token"):
            run(policy, target, **wrong)
    object.__setattr__(policy.support, "tool", object())
    with pytest.raises(ConfigError, match="without a tool"):
        run(policy, target, 1)


# Tempered policies


def test_a_tempered_policy_knows_its_log_q(lm: LanguageModel) -> None:
    """By the definition, from plain passes; its draws follow it; they are told from those of the policy."""
    policy = tiny_policy(lm, "{x}", support(1, 2))
    cold = tempered(policy, 0.5)
    log_q = policy_log_probs(cold, ROW)
    strings = [z for n in (1, 2) for z in cold.support.completions(n)]
    assert log_q.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    expected = torch.tensor([slow(policy, z, 0.5) for z in strings], dtype=torch.float64)
    torch.testing.assert_close(log_q, expected, atol=1e-4, rtol=0)
    rollouts, log_probs = cold.sample([ROW], 3000, seed=0)
    torch.testing.assert_close(
        log_probs.final(rollouts.lengths),
        cold.evaluate(rollouts).final(rollouts.lengths).detach(),
        atol=1e-4,
        rtol=0,
    )
    counts = Counter(map(tuple, rollouts.completions()))
    observed = torch.tensor([counts[tuple(z)] for z in strings])
    assert g_test(observed, log_q.exp()) > LEVEL
    assert g_test(observed, policy_log_probs(policy, ROW).exp()) < LEVEL


@torch.no_grad()
def slow(policy: Policy, z: list[int], temperature: float) -> float:
    """log q of a completion of a support of one stop symbol, at a temperature, by a plain pass per token."""
    law, total, prompt = policy.support, 0.0, policy.encode_rows([ROW])[0]
    for t in range(min(len(z) + 1, law.max_tokens)):
        logits = (
            policy.model(input_ids=torch.tensor([[*prompt, *z[:t]]])).logits[0, -1].double() / temperature
        )
        legal = [*law.allowed.nonzero().squeeze(1).tolist(), *(law.stop_ids if t >= law.min_tokens else ())]
        written = z[t] if t < len(z) else law.stop_ids[0]
        total += (logits[written] - logits[legal].logsumexp(0)).item()
    return total


def test_temperatures_multiply_and_leave_the_policy_alone(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", support())
    before = policy_log_probs(policy, ROW)
    twice = tempered(tempered(policy, 0.5), 0.5)
    torch.testing.assert_close(policy_log_probs(twice, ROW), policy_log_probs(tempered(policy, 0.25), ROW))
    torch.testing.assert_close(policy_log_probs(tempered(twice, 4.0), ROW), before)
    torch.testing.assert_close(policy_log_probs(policy, ROW), before)


def test_what_has_no_temperature_refuses(one_lm: LanguageModel, tmp_path: Path) -> None:
    cold = tempered(tiny_policy(one_lm, "{x}", support()), 0.5)
    with pytest.raises(ConfigError, match=r"amortlm\.tempered"):
        Posterior(cold, one_lm.log_prob("{z}", given="{x}")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ConfigError, match="tempered policy locally"):
        wire.tables(cold.support)


def test_temperatures_that_are_none_are_refused(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", support())
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            tempered(policy, wrong)
