"""A baseline that was interrupted goes on from its last checkpoint, and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import tiny_policy
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from amortlm.lab.baselines.finetune import BoundedReward
from amortlm.lab.baselines.grpo import train_grpo
from amortlm.lab.baselines.ppo import PPOConfig, train_ppo
from amortlm.lab.baselines.resume import EVERY
from amortlm.lab.baselines.sft import train_sft
from amortlm.lab.experiments import dice
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.types import Rollouts

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=["a", "b", "c", " cat", " ran"])
ROWS = [{"x": "the cat"}, {"x": "a dog ran"}]
STEPS, STOPPED_AT = EVERY + 3, EVERY + 1

Run = Callable[[Policy, Path, bool], "int | None"]  # returns the number of judged completions, if any


def length_of(rollouts: Rollouts) -> Tensor:
    return rollouts.lengths.float()


def sft(policy: Policy, folder: Path, resume: bool) -> None:
    gold = [["a.", "bc.", " cat."], ["ab.", " cat ran."]]
    train_sft(policy, ROWS, gold, output_dir=folder, max_steps=STEPS, batch_size=2, resume=resume)


def grpo(policy: Policy, folder: Path, resume: bool) -> int:
    reward = BoundedReward(length_of)
    train_grpo(policy, ROWS, reward, output_dir=folder, max_steps=STEPS, num_samples=4, resume=resume)
    return reward.evaluations


def ppo(policy: Policy, folder: Path, resume: bool) -> int:
    reward = BoundedReward(length_of)
    config = PPOConfig(max_steps=STEPS, num_samples=4, minibatches=2)
    train_ppo(policy, ROWS, reward, config=config, output_dir=folder, resume=resume)
    return reward.evaluations


def samples(policy: Policy, folder: Path, resume: bool) -> None:
    """SFT of `dice`, which always goes on."""
    settings = {"steps": STEPS, "rows_per_step": 2, "num_samples": 2, "sft": {"learning_rate": 1e-3}}
    dice.fit_samples(policy, ROWS, settings, 0, folder)


@pytest.fixture(autouse=True)
def outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dice, "stated_samples", lambda row, n, rng: rng.choices(["a.", "bc.", " cat."], k=n))


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C after so many updates."""
    updates = itertools.count(1)

    def count(*_: Any) -> None:
        if next(updates) == after:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


@contextmanager
def counted() -> Iterator[list[None]]:
    """An entry for each update within."""
    updates: list[None] = []
    handle = register_optimizer_step_post_hook(lambda *_: updates.append(None))
    try:
        yield updates
    finally:
        handle.remove()


def weights(policy: Policy) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("run", "per_step"), [(sft, 1), (grpo, 1), pytest.param(ppo, 4, marks=pytest.mark.slow), (samples, 1)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    run: Run, per_step: int, one_lm: LanguageModel, tmp_path: Path
) -> None:
    whole, stopped, resumed = (tiny_policy(one_lm, "{x}", SUPPORT) for _ in range(3))
    start = weights(whole)
    judged = run(whole, tmp_path / "whole", False)
    with interrupted(STOPPED_AT * per_step):
        run(stopped, tmp_path / "stopped", True)
    with counted() as updates:
        assert run(resumed, tmp_path / "stopped", True) == judged
    assert len(updates) == (STEPS - EVERY) * per_step
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("run", [sft, grpo, pytest.param(ppo, marks=pytest.mark.slow)])
def test_who_does_not_ask_starts_anew(run: Run, one_lm: LanguageModel, tmp_path: Path) -> None:
    for _ in range(2):
        with counted() as updates:
            run(tiny_policy(one_lm, "{x}", SUPPORT), tmp_path, False)
        assert len(updates) >= STEPS
