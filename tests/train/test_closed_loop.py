"""Corrected samples in training: they stand for the posterior, resume to the bit, and say what they cannot do."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stats import LEVEL
from trainers import ROWS, EmptyBuffer, losses, make_trainer, weights

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Lookup, Support
from amortlm.buffer import ReplayBuffer
from amortlm.errors import ConfigError
from amortlm.inference.exact import enumerate_posterior
from amortlm.train.source import ExperienceSource
from amortlm.types import row_key

WORDS = Support(
    stop=".", min_tokens=1, max_tokens=3, allowed_tokens=[" a", " the", " cat", " dog", " ran", "b"]
)
CALLS = 60


@pytest.mark.parametrize("corrected", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_forward_kl_nears_the_exact_posterior(
    one_lm: LanguageModel, tmp_path: Path, corrected: float
) -> None:
    """258 completions, as for the other objectives; and the control, the distance to another posterior."""
    trainer = make_trainer(
        one_lm,
        tmp_path,
        target=one_lm.log_prob("{z}{y}", given="{x}") * 2.0,
        support=WORDS,
        rows=ROWS[:2],
        max_steps=80,
        num_samples=32,
        warmup_steps=5,
        objective="forward_kl",
        behaviour={"corrected": corrected},
    )
    assert trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation") > 0.5
    trainer.train()
    assert trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation") < 0.1
    trainer.posterior.target = one_lm.log_prob("{z}{y}", given="{x}") * 0.5
    assert trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation") > 0.5


# What a corrected sample is


def source_of(lm: LanguageModel, folder: Path, **settings: Any) -> ExperienceSource:
    """An untrained source that corrects every prompt, with nine completions of the first row in its buffer."""
    trainer = make_trainer(
        lm,
        folder,
        support=WORDS,
        **{"behaviour": {"corrected": 1.0}, "corrected_particles": 16, "num_samples": 6, **settings},
    )
    texts = [" a", "b", " cat", " the cat", " dog ran", " a a", "bbb", " the dog ran", " cat cat cat"]
    trainer.add_gold(ROWS[:1], [texts])
    assert len(trainer.buffer) == len(texts)
    return trainer.source


def masses(source: ExperienceSource, calls: int) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """(completions, R at temperature 1.5, estimates of it [calls, M]), each from the same buffer."""
    exact = enumerate_posterior(source.target / 1.5, source.policy.support, ROWS[0])
    place = {tuple(z): i for i, z in enumerate(exact.completions)}
    known = list(source.buffer.entries(row_key(ROWS[0])))
    found = torch.zeros(calls, len(place), dtype=torch.float64)
    for i in range(calls):
        source.buffer._entries[row_key(ROWS[0])] = list(known)
        completions, log_mass = source.estimate(ROWS[0], (i, 0))
        index = torch.tensor([place[tuple(z[:-1])] for z in completions])
        found[i].index_add_(0, index, log_mass.exp())
    return exact.completions, (exact.log_p + exact.log_z).exp(), found


@pytest.mark.parametrize("method", ["sir", "smc"])
def test_pool_and_buffer_estimate_the_reward_measure(
    one_lm: LanguageModel, tmp_path: Path, method: str
) -> None:
    """Unbiased for the total and for what is not in the buffer, exact for what is; at a reward temperature."""
    source = source_of(
        one_lm, tmp_path, corrected_method=method, reward_temperature=(1.5, 1.5, 1), corrected_particles=8
    )
    known = {e.tokens for e in source.buffer.entries(row_key(ROWS[0]))}
    completions, reward, found = masses(source, CALLS)
    stored = torch.tensor([tuple(z) in known for z in completions])
    torch.testing.assert_close(found[:, stored], reward[stored].expand(CALLS, -1), rtol=1e-4, atol=0)

    def p_value(values: torch.Tensor, truth: torch.Tensor) -> float:
        z = (values.mean() - truth) / (values.std() / math.sqrt(len(values)))
        return math.erfc(abs(z.item()) / math.sqrt(2))

    rest = found[:, ~stored].sum(1)
    assert p_value(rest, reward[~stored].sum()) > LEVEL
    assert p_value(found.sum(1), reward.sum()) > LEVEL
    # The control: counting what the buffer knows twice is caught.
    assert p_value(rest + reward[stored].sum() * 2, reward.sum()) < LEVEL


def test_draws_follow_the_estimate_and_the_pool_is_kept(one_lm: LanguageModel, tmp_path: Path) -> None:
    source = source_of(one_lm, tmp_path)
    key = row_key(ROWS[0])
    before = list(source.buffer.entries(key))
    shares = []
    for step in range(20):
        drawn = source._correct(ROWS[0], (step, 0))
        assert set(source.buffer.entries(key)) > set(before), "the pool goes into the buffer"
        source.buffer._entries[key] = list(before)
        completions, log_mass = source.estimate(ROWS[0], (step, 0))
        source.buffer._entries[key] = list(before)
        assert len(drawn) == 3
        for z in completions:
            same = [i for i, other in enumerate(completions) if other == z]
            share = log_mass.softmax(0)[same].sum().item()
            # Systematic resampling: each copy at most one off.
            assert abs(drawn.count(z) - 3 * share) <= len(same)
            shares.append(share)
    assert max(shares) > 0.4, "some are due at least one copy"


@pytest.mark.parametrize(("objective", "count"), [("vargrad", 3), ("subtb", 3), ("forward_kl", 6)])
def test_half_of_a_corrected_prompt_is_fresh_except_for_forward_kl(
    one_lm: LanguageModel, tmp_path: Path, objective: str, count: int
) -> None:
    """The other prompts get what they would have got without correction."""
    rest = {} if objective == "forward_kl" else {"replay": 0.25, "tempered": 0.25}
    on = source_of(one_lm, tmp_path, behaviour={"corrected": 0.5, **rest}, objective=objective)
    off = source_of(one_lm, tmp_path, behaviour=rest, objective=objective)
    seen = set()
    for step in range(6):
        chosen = [c.corrected for c in on.choices(ROWS, (step, 0))]
        given: dict[str, list[list[int]]] = {}

        def spy(row: Any, at: Any, correct: Any = on._correct, given: Any = given) -> list[list[int]]:
            given[row_key(row)] = correct(row, at)
            return given[row_key(row)]

        on._correct = spy  # type: ignore[method-assign]
        got, plain = (source.collect(ROWS, (step, 0)).rollouts for source in (on, off))
        on._correct = ExperienceSource._correct.__get__(on)  # type: ignore[method-assign]
        for n, row in enumerate(ROWS):
            mine = [z for z, i in zip(got.completions(), got.row_index.tolist(), strict=True) if i == n]
            theirs = [z for z, i in zip(plain.completions(), plain.row_index.tolist(), strict=True) if i == n]
            assert len(mine) == 6
            assert (row_key(row) in given) == chosen[n]
            seen.add(chosen[n])
            if chosen[n]:
                assert len(given[row_key(row)]) == count
                assert mine[6 - count :] == [z[:-1] for z in given[row_key(row)]]
            elif objective == "forward_kl":  # on-policy: no replay, so the buffers' contents cannot tell
                assert mine == theirs
    assert seen == {True, False}


def test_the_share_of_prompts(one_lm: LanguageModel, tmp_path: Path) -> None:
    source = source_of(one_lm, tmp_path, behaviour={"corrected": 0.3})
    n = 2000
    hits = sum(sum(c.corrected for c in source.choices(ROWS, (step, 0))) for step in range(n // len(ROWS)))
    z = (hits - 0.3 * n) / math.sqrt(0.21 * n)
    assert math.erfc(abs(z) / math.sqrt(2)) > LEVEL
    assert math.erfc(abs(hits - 0.5 * n) / math.sqrt(0.25 * n) / math.sqrt(2)) < LEVEL  # the control


def test_a_split_over_processes_draws_the_same(one_lm: LanguageModel, tmp_path: Path) -> None:
    """From equal buffers, whatever shares the batch."""
    whole = source_of(one_lm, tmp_path)
    split = source_of(one_lm, tmp_path)

    def drawn(source: ExperienceSource, rows: Any, step: int) -> list[list[int]]:
        return source.collect(rows, (step, 0)).rollouts.completions()

    together = drawn(whole, ROWS[:4], 2)
    assert together == [z for rows in (ROWS[:2], ROWS[2:4]) for z in drawn(split, rows, 2)]
    assert drawn(whole, ROWS[:4], 3) != together


def test_forward_kl_takes_corrected_samples_for_draws_of_the_posterior(
    one_lm: LanguageModel, tmp_path: Path
) -> None:
    """With every prompt corrected the value is zero, and the weights move all the same."""
    settings = {"max_steps": 2, "warmup_steps": 0, "objective": "forward_kl"}
    trainer = make_trainer(one_lm, tmp_path, behaviour={"corrected": 1.0}, **settings)
    start = weights(trainer).clone()
    trainer.train()
    assert max(map(abs, losses(trainer))) < 1e-5
    assert (weights(trainer) - start).norm() > 1e-3
    control = make_trainer(one_lm, tmp_path, behaviour={"policy": 1.0}, **settings)
    control.train(overwrite_output_dir=True)
    assert min(losses(control)) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "vargrad", "behaviour": {"corrected": 0.5, "replay": 0.15, "tempered": 0.175}},
        {"objective": "forward_kl", "behaviour": {"corrected": 0.5}, "corrected_method": "smc"},
    ],
    ids=["vargrad-sir", "forward_kl-smc"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    one_lm: LanguageModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "reward_temperature": (1.5, 1.0, 6),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "corrected_particles": 6,
        **settings,
    }

    def resumed(folder: Path, *callbacks: Any) -> GFNTrainer:
        trainer = make_trainer(one_lm, folder, **settings)
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
        for callback in callbacks:
            trainer.add_callback(callback(trainer))
        torch.manual_seed(99)  # whatever the interruption left behind
        trainer.train(resume_from_checkpoint=True)
        return trainer

    whole = make_trainer(one_lm, tmp_path / "whole", **settings)
    whole.train()
    half = resumed(tmp_path / "half")
    assert losses(half) == losses(whole)
    assert torch.equal(weights(half), weights(whole))
    assert half.buffer._entries == whole.buffer._entries
    # The control: with an empty buffer the corrected samples are others.
    assert losses(resumed(tmp_path / "other", EmptyBuffer)) != losses(whole)


# Tools and refusals


def test_a_tool_is_corrected_by_sir_and_refused_by_smc(one_lm: LanguageModel, tmp_path: Path) -> None:
    support = Support(stop=".", min_tokens=1, max_tokens=6, tool=Lookup({"cat": " dog ran"}, trigger=":"))
    settings = {"support": support, "behaviour": {"corrected": 1.0}, "objective": "vargrad", "max_steps": 2}
    trainer = make_trainer(one_lm, tmp_path, **settings)
    start = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), start)
    with pytest.raises(ConfigError, match="use corrected_method='sir'"):
        make_trainer(one_lm, tmp_path, corrected_method="smc", **settings)


def test_without_a_buffer_only_the_pool_is_resampled(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(
        one_lm, tmp_path, buffer_size=0, behaviour={"corrected": 1.0}, corrected_particles=5
    )
    completions, _ = trainer.source.estimate(ROWS[0], (0, 0))
    assert len(completions) == 5
    assert isinstance(trainer.buffer, ReplayBuffer)
    assert len(trainer.buffer) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "forward_kl"}, r"biased by .*\(tempered, replay\): write behaviour={'policy': 1.0}"),
        (
            {"objective": "forward_kl", "behaviour": {"corrected": 0.5, "replay": 0.5}},
            "behaviour={'corrected': 0.5}",
        ),
        ({"objective": "forward_kl", "behaviour": {}, "epsilon": 0.1}, r"\(epsilon\).*epsilon=0"),
        ({"objective": "forward_kl", "behaviour": {}, "num_samples": 1}, "at least 2"),
        ({"corrected_method": "mh"}, "'sir' or 'smc', not 'mh'"),
        ({"corrected_particles": 0}, "corrected_particles >= 1"),
        (
            {"behaviour": {"corrected": 0.5}, "num_samples": 1, "objective": {"tb": {"log_z": "learned"}}},
            "num_samples >= 2",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GFNConfig(**settings)
