"""genlm-control's potentials as targets, and our objectives on them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from genlm_cases import (
    ROW,
    TARGETS,
    TOKENS,
    context,
    infilling,
    made,
    support,
    wait,
)
from reference import random_rollouts

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Support, constraint, default_lora
from amortlm.errors import ConfigError
from amortlm.targets.laws import check_target

pytest.importorskip("genlm.control", reason="needs the extra: pip install 'amortlm[genlm]'")

from genlm.control import BoolFSA, Potential

from amortlm.interop.genlm import from_potential, run, to_potential


def test_a_byte_potential_judges_the_text(lm: LanguageModel, policy: Policy) -> None:
    target = from_potential(BoolFSA.from_regex("( a| cat)*s?")).bind(lm)
    every = [z for n in range(4) for z in policy.support.completions(n)]
    rollouts = policy.rollouts([ROW], [every])
    ours = constraint.predicate(lambda text: re.fullmatch("( a| cat)*s?", text) is not None).bind(lm)
    assert torch.equal(target.score(rollouts), ours.score(rollouts))
    scores = target.score(rollouts)[rollouts.stop_mask]
    assert (scores == 0).any()
    assert torch.isneginf(scores).any()  # s is not where it may be
    dogs = from_potential(BoolFSA.from_regex("( dog)*")).bind(lm)  # does not know the letters of " cat"
    assert torch.isneginf(dogs.score(rollouts)[:, 1:][rollouts.stop_mask[:, 1:]]).all()
    check_target(target, rollouts)


@pytest.mark.parametrize("name", TARGETS)
def test_there_and_back(lm: LanguageModel, name: str) -> None:
    target = made(name, lm)
    back = from_potential(to_potential(target, support(), ROW, lm)).bind(lm)
    rollouts = random_rollouts(lm, support(), [ROW], 12)
    asked = rollouts if target.every_prefix else rollouts.final_only()
    torch.testing.assert_close(back.score(asked), target.score(asked), atol=1e-4, rtol=0)
    check_target(back, rollouts)


def test_a_potential_is_asked_where_an_event_loop_runs(lm: LanguageModel, policy: Policy) -> None:
    once = from_potential(to_potential(infilling(lm), support(), ROW, lm))
    twice = to_potential(once, support(), ROW, lm)
    z = context(twice, [lm.token_id("s")])
    log_r = infilling(lm).score_final(policy.rollouts([ROW], [["s"]])).item()
    assert wait(twice.complete(z)) == pytest.approx(log_r, abs=1e-4)
    assert run(asyncio.sleep(0, result=3)) == 3


class Letters(Potential):
    """Over characters, which are no vocabulary of ours."""

    async def complete(self, context: list[Any]) -> float:
        return 0.0

    prefix = complete


def test_what_cannot_be_is_refused(lm: LanguageModel) -> None:
    for vocabulary in (["a", "b"], [0, 300]):
        with pytest.raises(ConfigError, match="coerce"):
            from_potential(Letters(vocabulary))
    target = from_potential(Letters([b" a", b"s"]))
    with pytest.raises(ConfigError, match="bind"):
        target.score(random_rollouts(lm, support(), [ROW], 4))
    with pytest.raises(ConfigError, match="verifier"):
        target.to_spec()
    scores = target.bind(lm).score(random_rollouts(lm, support(), [ROW], 40))
    assert (scores == 0).any()
    assert torch.isneginf(scores).any()  # " cat" is not in its vocabulary


@pytest.mark.slow
def test_training_on_a_potential_nears_the_exact_posterior(lm: LanguageModel, tmp_path: Path) -> None:
    words = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=[*TOKENS, " dog"])
    automaton = BoolFSA.from_regex("([a-z]| )*(dog|s)([a-z]| )*")
    target = 2.0 * lm.log_prob("{z}{y}", given="{x}") + from_potential(automaton)
    settings = {"max_steps": 100, "num_samples": 64, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    args = GFNConfig(
        output_dir=str(tmp_path), use_cpu=True, save_strategy="no", diagnose_steps=0, warmup_steps=5, epsilon=0.1,
        objective="subtb", report_to=[], **settings,
    )  # fmt: skip
    trainer = GFNTrainer(
        lm,
        target=target,
        prompt="{x}{y}",
        support=words,
        train_dataset=[ROW],
        args=args,
        adapter=default_lora(4),
    )

    def gap() -> float:
        return trainer.posterior.diagnose([ROW], 32).mean("total_variation")

    before = gap()
    trainer.train()
    assert before > 0.5
    assert gap() < 0.1
