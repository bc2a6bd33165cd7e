"""genlm-control's samplers on our targets and policies, against enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from genlm_cases import (
    ROW,
    context,
    infilling,
    made,
    support,
    wait,
)
from reference import random_rollouts

from amortlm import LanguageModel, Policy, Support, constraint
from amortlm.inference.exact import enumerate_posterior
from amortlm.targets.base import Target

pytest.importorskip("genlm.control", reason="needs the extra: pip install 'amortlm[genlm]'")

from genlm.backend.llm import AsyncTransformer
from genlm.control import AWRS, EOS, SMC, BoolFSA, PromptedLLM, direct_token_sampler

from amortlm.interop.genlm import critic, from_potential, proposal, to_potential

STEPS = 5  # of a genlm sampler: three tokens, EOS, and one more, since at the last it forces EOS particle by particle
RUNS, PARTICLES = 25, 40
SIGMAS = 8.0  # two-sided tail 3e-8 with 24 degrees of freedom
CLOSE = 0.12  # total variation of the thousand weighted particles


def samplers(lm: LanguageModel, policy: Policy) -> dict[str, SMC]:
    """Of the hard target. AWRS draws each token without replacement until one is accepted."""
    target, q = made("hard", lm), proposal(policy, ROW)
    r = to_potential(target, support(), ROW, lm)
    plain = to_potential(infilling(lm), support(), ROW, lm)
    word = to_potential(constraint.contains("cat"), support(), ROW, lm)
    spelt = BoolFSA.from_regex("([a-z]| )* cat( ([a-z]| )*)?").coerce(
        q, f=b"".join
    )  # the same word, by genlm
    return {
        "q, critic and automaton": SMC(
            direct_token_sampler(q), critic=critic(infilling(lm), policy, ROW) * spelt
        ),
        "q and critic": SMC(direct_token_sampler(q), critic=critic(target, policy, ROW)),
        "target alone": SMC(direct_token_sampler(r)),
        "target by q": SMC(direct_token_sampler(r, proposal=q)),
        "rejection": SMC(AWRS(plain, word, seed=0)),
        "rejection by q": SMC(AWRS(plain, word, seed=0, proposal=q)),
    }


def masses(sampler: SMC, threshold: float) -> list[dict[tuple[int, ...], float]]:
    """For each of seeded runs: the unnormalised mass of every completion found, unbiased for R."""
    torch.manual_seed(0)
    np.random.seed(0)
    runs = []
    for _ in range(RUNS):
        mass: dict[tuple[int, ...], float] = {}
        got = wait(sampler(PARTICLES, threshold, STEPS))
        for tokens, log_w in got:
            assert tokens[-1] is EOS or log_w == -math.inf
            z = tuple(t.token_id for t in tokens if t is not EOS)
            mass[z] = mass.get(z, 0.0) + math.exp(log_w) / PARTICLES
        assert math.exp(got.log_ml) == pytest.approx(sum(mass.values()))
        runs.append(mass)
    return runs


def agreement(
    runs: list[dict[tuple[int, ...], float]], target: Target, policy: Policy
) -> tuple[float, float]:
    """(total variation of the pooled runs to the exact posterior, z-score of their mean Z-hat against Z)."""
    exact = enumerate_posterior(target, policy.support, ROW)
    z_hat = torch.tensor([sum(mass.values()) for mass in runs]).double()
    pooled = torch.tensor([sum(m.get(tuple(z), 0.0) for m in runs) for z in exact.completions]).double()
    total_variation = 0.5 * (pooled / z_hat.sum() - exact.log_p.exp()).abs().sum().item()
    error = z_hat.std() / math.sqrt(len(runs))
    return total_variation, ((z_hat.mean() - math.exp(exact.log_z)) / error).item()


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("q and critic", 0.9),
        ("q and critic", 0.0),
        ("q, critic and automaton", 0.9),
        ("target alone", 0.9),
        pytest.param("target by q", 0.9, marks=pytest.mark.slow),
        ("rejection", 0.9),
        pytest.param("rejection by q", 0.9, marks=pytest.mark.slow),
    ],
)
def test_samplers_of_genlm_agree_with_enumeration(
    lm: LanguageModel, policy: Policy, name: str, threshold: float
) -> None:
    runs = masses(samplers(lm, policy)[name], threshold)
    total_variation, score = agreement(runs, made("hard", lm), policy)
    assert total_variation < CLOSE
    assert abs(score) < SIGMAS
    for wrong in (infilling(lm), made("hard", lm) * 2):
        total_variation, score = agreement(runs, wrong, policy)
        assert total_variation > CLOSE
        assert abs(score) > SIGMAS


# Beside genlm's own language models


def test_vocabularies_fit_genlms_language_model(embedded: LanguageModel) -> None:
    """Its model, its tokens, one text: the same log-probability both ways, and our q as its proposal."""
    shape = Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=[" dog", " cat", " and"])
    row = {"x": "She saw the"}
    llm = PromptedLLM(
        AsyncTransformer(embedded.model, embedded.tokenizer),
        prompt_ids=embedded.encode_start(row["x"]),
        eos_byte_strings=[b"."],
    )
    target = embedded.log_prob("{z}", given="{x}")
    ours, z = to_potential(target, shape, row, embedded), [embedded.token_id(" dog")]
    assert ours.vocab_eos == llm.vocab_eos
    assert [bytes(t) for t in ours.vocab] == [bytes(t) for t in llm.vocab]
    assert wait(ours.complete(context(ours, z))) == pytest.approx(
        wait(llm.complete(context(llm, z))), abs=1e-3
    )
    policy = Policy(embedded, "{x}", shape)
    rollouts = random_rollouts(embedded, shape, [row], 4)
    theirs = from_potential(llm).bind(embedded).score(rollouts)
    torch.testing.assert_close(theirs, target.score(rollouts), atol=1e-3, rtol=0)
    sampler = SMC(direct_token_sampler(llm, proposal=proposal(policy, row)))
    got = wait(sampler(200, 0.0, 4))
    exact = enumerate_posterior(target, policy.support, row)
    assert got.log_ml == pytest.approx(exact.log_z, abs=1.0)
