"""What the user leaves open is chosen from the rows and the target, and said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Support, constraint, verifier
from amortlm.errors import ConfigError, RewardError
from amortlm.objectives import parse
from amortlm.train.behaviour import DEFAULT, full_mix
from amortlm.types import Row

FEW = {"subtb": {"states": 4}}
OPEN = {"objective": "auto", "num_samples": 0, "per_device_train_batch_size": 8}


def lengths(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    return [float(-len(text)) for text in texts]


@pytest.mark.parametrize(
    ("of", "given", "objective"),
    [
        ("{z}", "{x}", "subtb"),
        ("{x}{z}", "", "subtb"),
        ("{z}{y}", "{x}", FEW),
        ("{y}", "{x}{z}", FEW),
    ],
)
def test_the_objective_follows_the_text_after_z(
    one_lm: LanguageModel, tmp_path: Path, of: str, given: str, objective: str | dict[str, Any]
) -> None:
    trainer = make_trainer(one_lm, tmp_path, target=one_lm.log_prob(of, given=given), **OPEN)
    assert trainer.objective == parse(objective)
    assert trainer.args.objective == trainer.objective.stated
    assert any(sentence.startswith(f"objective={objective!r}") for sentence in trainer.chosen)


def test_of_a_sum_one_term_with_a_suffix_decides(one_lm: LanguageModel, tmp_path: Path) -> None:
    prior = one_lm.log_prob("{z}", given="{x}")
    for target, objective in (
        (1.5 * prior - 0.5 * one_lm.log_prob("{z}"), "subtb"),
        (prior + one_lm.log_prob("{z}{y}", given="{x}"), FEW),
    ):
        assert make_trainer(one_lm, tmp_path, target=target, **OPEN).objective == parse(objective)


def test_a_judge_of_finished_text_trains_without_settings(one_lm: LanguageModel, tmp_path: Path) -> None:
    target = one_lm.log_prob("{z}", given="{x}") + verifier(lengths)
    trainer = make_trainer(one_lm, tmp_path, target=target, **{**OPEN, "max_steps": 1})
    assert trainer.objective.name == "vargrad"
    trainer.train()
    with pytest.raises(RewardError, match="judge only finished"):
        make_trainer(one_lm, tmp_path, target=target, objective="subtb")


@pytest.mark.parametrize(("rows", "batch", "k"), [(1, 8, 64), (3, 8, 21), (5, 2, 32), (5, 8, 12), (20, 8, 8)])
def test_an_update_has_64_completions(
    one_lm: LanguageModel, tmp_path: Path, rows: int, batch: int, k: int
) -> None:
    many = [{**row, "x": row["x"] + " a" * i} for i in range(4) for row in ROWS]
    settings: dict[str, Any] = {**OPEN, "per_device_train_batch_size": batch}
    trainer = make_trainer(one_lm, tmp_path, many[:rows], **settings)
    assert trainer.args.num_samples == k


def test_what_is_given_stays_and_nothing_is_said(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, objective="tb", num_samples=3)
    assert (trainer.objective.name, trainer.args.num_samples, trainer.chosen) == ("tb", 3, [])


def test_what_is_chosen_has_to_fit_as_what_is_given(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares samples of one prompt"):
        make_trainer(one_lm, tmp_path, objective="auto", num_samples=1)
    with pytest.raises(ConfigError, match="biased"):
        make_trainer(one_lm, tmp_path, objective="forward_kl", num_samples=0)
    with pytest.raises(ConfigError, match="num_samples=-1"):
        make_trainer(one_lm, tmp_path, num_samples=-1)


def test_with_a_pattern_the_prior_looks_ahead(one_lm: LanguageModel, tmp_path: Path) -> None:
    """Unless the user says how prompts are drawn, or the objective takes draws of the policy alone."""
    told = Support(stop=".", max_tokens=3, pattern="a.*")
    trainer = make_trainer(one_lm, tmp_path, support=told)
    assert trainer.args.behaviour["prior"] == 0.125
    assert sum(trainer.args.behaviour.values()) == 1
    assert any(sentence.startswith("behaviour=") for sentence in trainer.chosen)
    narrowed = one_lm.log_prob("{z}{y}", given="{x}") + constraint.contains("a")
    assert make_trainer(one_lm, tmp_path, target=narrowed).args.behaviour["prior"] == 0.125
    assert make_trainer(one_lm, tmp_path).args.behaviour == DEFAULT
    own = {"policy": 0.5, "replay": 0.5}
    assert make_trainer(one_lm, tmp_path, support=told, behaviour=own).args.behaviour == full_mix(own)
    own = {"policy": 1.0}
    trainer = make_trainer(one_lm, tmp_path, support=told, objective="forward_kl", behaviour=own)
    assert trainer.args.behaviour == full_mix(own)
