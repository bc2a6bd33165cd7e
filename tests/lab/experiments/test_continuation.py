"""Prompts, the choice of a decoder's setting, and who dominates whom."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from amortlm.errors import DataError
from amortlm.lab.experiment import Context
from amortlm.lab.experiments import continuation, frontier
from amortlm.lab.experiments.continuation import EXPERIMENT, opening
from amortlm.language_model import LanguageModel

SMOKE = EXPERIMENT.presets["smoke"]


def test_prompts_open_stories_that_go_on() -> None:
    story = "One day a cat  ran.\nIt was red. It sat down. The end."
    assert opening(story, 2) == "One day a cat ran. It was red."
    assert opening(story, 4) is None  # nothing follows
    assert opening('He said "no". She ran! It rained.', 2) is None  # no plain statement to continue


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder by first token, so that no package is needed: the space before it, then a letter."""
    monkeypatch.setattr(continuation, "encoder_folder", lambda folder: folder)

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.eye(128)[[ord((text.strip() or "?")[0]) % 128 for text in texts]]

    monkeypatch.setattr(continuation, "_encoder", lambda folder: encode)


def test_prompts_of_a_file(light: None, embedded: LanguageModel, tmp_path: Path) -> None:
    lines = [f"Line number {n} is here. " for n in range(4)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*lines, lines[0], "", "long " * 200]))
    for data in (file, tmp_path):
        found = EXPERIMENT.prepare(SMOKE, embedded, data)
        assert [row["x"] for row in found.test + found.train] == [line.strip() for line in lines]
    stories = tmp_path / "stories.txt"
    stories.write_text("<|endoftext|>".join(f"It was {c}. She ran. He sat. They left." for c in "abcd"))
    found = EXPERIMENT.prepare(SMOKE, embedded, stories)
    assert [row["x"] for row in found.test] == ["It was a. She ran.", "It was b. She ran."]
    with pytest.raises(DataError, match="lower these"):
        EXPERIMENT.prepare({**SMOKE, "train_prompts": 9}, embedded, stories)
    with pytest.raises(DataError, match="cannot read"):
        EXPERIMENT.prepare(SMOKE, embedded, tmp_path / "none.txt")


@pytest.mark.parametrize("method", ["temperature", "greedy", "best-of-n", "gflownet-0.8"])
def test_figures_of_a_method(light: None, embedded: LanguageModel, tmp_path: Path, method: str) -> None:
    grid = {**SMOKE["grids"], "temperature": [{"temperature": t} for t in (3.0, 0.3)]}
    settings = {**SMOKE, "grids": grid}
    data = EXPERIMENT.prepare(settings, embedded, None)
    context = Context(settings, embedded, data, method.startswith("gflownet"), folder=tmp_path)
    outcome = EXPERIMENT.evaluate(context, EXPERIMENT.methods[method](context))
    assert set(outcome.metrics) == set(EXPERIMENT.metrics)
    points = outcome.details["points"]
    assert all(p["max_ll"] >= p["mean_ll"] and p["token_passes"] >= 2 for p in points)
    computes = {p["compute"] for p in points if p["split"] == "test"}
    more = {"temperature": {1, 2}, "greedy": {1}, "best-of-n": {2}, "gflownet-0.8": {1}}
    assert computes == more[method]
    assert math.isnan(outcome.metrics["max_ll_more"]) == (2 not in computes)
    assert math.isnan(outcome.metrics["diversity"]) == (method == "greedy")
    if method == "temperature":
        assert outcome.details["chosen"] == {"temperature": 0.3}  # by training prompts
    json.dumps(outcome.details)


def run(points: list[tuple[str, dict[str, float], int, float, float | None]]) -> list[dict[str, Any]]:
    made = [
        {"split": s, "setting": x, "compute": c, "max_ll": a, "mean_ll": a, "diversity": b}
        for s, x, c, a, b in points
    ]
    return [{"details": {"points": made}}]


def test_standing_by_hand(tmp_path: Path) -> None:
    decoders = {
        "temperature": run(
            [("test", {"temperature": 1.0}, 1, -5.0, 0.5), ("test", {"temperature": 1.0}, 5, -3.0, 0.5)]
        )
        + run([("test", {"temperature": 1.0}, 1, -5.2, 0.6), ("test", {"temperature": 1.0}, 5, -3.0, 0.5)]),
        "greedy": run([("train", {}, 1, 0.0, 0.9), ("test", {}, 1, -1.0, None)]),
        "resampling": run([("test", {"n": 16}, 16, -0.5, 0.99)]),
    }
    ours = {
        "gflownet-0.8": run([("test", {}, 1, -4.0, 0.4)]),
        "gflownet-0.9": run([("test", {}, 1, -5.1, 0.56)]),
        "gflownet-1": run([("test", {}, 1, -6.0, 0.5)]),
    }
    results = {"runs": decoders | ours, "settings": {"compute": 5}}
    found = frontier.standing(results)
    assert found["gflownet-0.8"]["same"] == {
        "dominated": False,
        "dominated_by": [],
        "dominates": [],
        "diversity_margin": None,  # greedy alone is as likely, and has no diversity
    }
    more = found["gflownet-0.8"]["more"]
    assert more["dominated_by"] == ["temperature temperature=1 (5x)"]
    assert more["diversity_margin"] == pytest.approx(-0.1)
    # The mean over seeds of the decoder is (-5.1, 0.55).
    assert found["gflownet-0.9"]["same"]["dominates"] == ["temperature temperature=1 (1x)"]
    assert found["gflownet-1"]["same"]["dominated"]
    assert frontier.figures(results, tmp_path) == ["frontier.png"]
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "standing.json").read_text()) == found
    assert "2 of 3 at equal compute" in frontier.headline(found)
