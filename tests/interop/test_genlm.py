"""Our targets and policies as potentials: genlm-control's own laws, and exact weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from genlm_cases import (
    PAIRS,
    ROW,
    SUPPORTS,
    context,
    finished,
    infilling,
    made,
    prefixes,
    support,
    wait,
)
from reference import tiny_policy

from amortlm import LanguageModel, Policy, verifier
from amortlm.errors import ConfigError
from amortlm.inference.exact import enumerate_posterior, policy_log_probs
from amortlm.targets.base import Target

pytest.importorskip("genlm.control", reason="needs the extra: pip install 'amortlm[genlm]'")

from genlm.control import EOS

from amortlm.interop.genlm import critic, proposal, to_potential


@pytest.mark.parametrize(("name", "where"), PAIRS)
def test_potentials_obey_the_laws_of_genlm(lm: LanguageModel, name: str, where: str) -> None:
    policy, target = tiny_policy(lm, "{x}", SUPPORTS[where]), made(name, lm)
    exact = enumerate_posterior(target, policy.support, ROW)
    chosen = exact.completions[:: max(1, len(exact.completions) // 5)]
    for potential in (
        to_potential(target, SUPPORTS[where], ROW, lm),
        proposal(policy, ROW),
        critic(target, policy, ROW),
    ):
        contexts = prefixes(potential, chosen)
        wait(potential.assert_contract([[], contexts[-1]], batch_contexts=contexts[:4], atol=2e-4))


def test_a_potential_that_breaks_the_laws_is_told_apart(
    lm: LanguageModel, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    potential = critic(infilling(lm), policy, ROW)
    contexts = [context(potential, [potential.vocab[i].token_id]) for i in potential._columns]
    wait(potential.assert_contract(contexts, atol=2e-4))

    async def one(contexts: list[Any]) -> np.ndarray:
        return np.zeros(len(contexts))

    monkeypatch.setattr(potential, "_nonzero_prefix", one)  # the prefix weight is not divided out
    with pytest.raises(AssertionError, match="not satisfied"):
        wait(potential.assert_contract(contexts, atol=2e-4))


@pytest.mark.parametrize(("name", "where"), PAIRS)
def test_complete_is_the_exact_weight(lm: LanguageModel, name: str, where: str) -> None:
    policy, target = tiny_policy(lm, "{x}", SUPPORTS[where]), made(name, lm)
    exact = enumerate_posterior(target, policy.support, ROW)
    log_q = policy_log_probs(policy, ROW)
    r, q = to_potential(target, SUPPORTS[where], ROW, lm), proposal(policy, ROW)
    contexts = [context(r, z) for z in exact.completions]
    log_r = exact.log_p.numpy() + exact.log_z
    np.testing.assert_allclose(wait(r.batch_complete(contexts)), log_r, atol=1e-4)
    np.testing.assert_allclose(wait(q.batch_complete(contexts)), log_q.numpy(), atol=1e-4)
    product = q * critic(target, policy, ROW)
    np.testing.assert_allclose(wait(product.batch_complete(contexts)), log_r, atol=2e-4)


@pytest.mark.parametrize(("name", "where"), PAIRS)
def test_no_prefix_of_a_possible_completion_has_weight_zero(lm: LanguageModel, name: str, where: str) -> None:
    policy, target = tiny_policy(lm, "{x}", SUPPORTS[where]), made(name, lm)
    completions = [z for n in range(4) for z in policy.support.completions(n)]
    for potential in (to_potential(target, SUPPORTS[where], ROW, lm), critic(target, policy, ROW)):
        assert np.isfinite(wait(potential.batch_prefix(prefixes(potential, completions)))).all()


def test_prefix_weights_by_hand(lm: LanguageModel, policy: Policy) -> None:
    """What stopping there weighs; a term that is zero there, or judges finished text only, is left out."""
    a, cat = lm.token_id(" a"), lm.token_id(" cat")
    for name in ("infilling", "hard", "both"):
        potential = to_potential(made(name, lm), support(), ROW, lm)
        log_r = infilling(lm).score_final(policy.rollouts([ROW], [[[a], [a, cat]]]))
        got = wait(potential.batch_prefix([context(potential, z) for z in ([a], [a, cat])]))
        np.testing.assert_allclose(got, log_r.numpy(), atol=1e-4)
    rollouts = policy.rollouts([ROW], [[[a]]])
    log_w = infilling(lm).score_final(rollouts) - policy.evaluate(rollouts).final(rollouts.lengths)
    weight = critic(made("hard", lm), policy, ROW)
    assert wait(weight.prefix(context(weight, [a]))) == pytest.approx(log_w.item(), abs=1e-4)
    for potential in (
        to_potential(verifier(finished), support(), ROW, lm),
        critic(verifier(finished), policy, ROW),
        to_potential(infilling(lm), support(2), ROW, lm),
    ):
        assert wait(potential.prefix(context(potential, [a]))) == 0.0


def test_outside_the_support_everything_weighs_nothing(lm: LanguageModel) -> None:
    shape = support(2)
    policy = tiny_policy(lm, "{x}", shape)
    a, dog = lm.token_id(" a"), lm.token_id(" dog")
    for potential in (
        to_potential(infilling(lm), shape, ROW, lm),
        proposal(policy, ROW),
        critic(infilling(lm), policy, ROW),
    ):
        outside = [context(potential, z) for z in ([a], [a, dog], [a] * 4)]
        assert wait(potential.batch_complete(outside)).tolist() == [-math.inf] * 3
        assert np.isneginf(wait(potential.batch_prefix(outside))).tolist() == [False, True, True]
        with pytest.raises(ValueError, match="weight zero"):
            wait(potential.logw_next(outside[1]))
        assert not {lm.token_id("."), lm.token_id("!")} & {t.token_id for t in potential.vocab}
        full = wait(potential.logw_next(context(potential, [a, a, a])))
        assert np.isfinite(full.weights).sum() == 1
        assert math.isfinite(full[EOS])


def test_lists_that_cannot_be_weigh_nothing(lm: LanguageModel) -> None:
    policy = tiny_policy(lm, "{x}", SUPPORTS["lists"])
    a, line = lm.token_id(" a"), lm.token_id("\n")
    for potential in (
        to_potential(infilling(lm), SUPPORTS["lists"], ROW, lm),
        proposal(policy, ROW),
        critic(infilling(lm), policy, ROW),
    ):
        contexts = [context(potential, z) for z in ([line], [line, a], [a, line], [a, line, line])]
        assert np.isneginf(wait(potential.batch_prefix(contexts))).tolist() == [True, True, False, True]


def test_many_prefixes_cost_one_score(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    potential, calls = to_potential(infilling(lm), support(), ROW, lm), []
    completions = [z for n in range(3) for z in potential.support.completions(n)]
    plain = Target.score

    def counted(self: Target, rollouts: Any) -> Any:
        calls.append(len(rollouts))
        return plain(self, rollouts)

    monkeypatch.setattr(Target, "score", counted)
    wait(potential.batch_prefix([context(potential, z) for z in completions]))
    assert calls == [13]
    calls.clear()
    wait(potential.logw_next([]))
    assert calls == [1, 3, 1]  # the context, what can follow, the end


def test_a_tool_is_refused(lm: LanguageModel) -> None:
    shape = support(tool={"lookup": {"table": {"a": "b"}}})
    with pytest.raises(ConfigError, match="without a tool"):
        to_potential(infilling(lm), shape, ROW, lm)
