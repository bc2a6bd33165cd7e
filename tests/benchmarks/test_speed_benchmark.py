"""The yardstick of benchmarks/speed.py does the library's work: same samples, same loss, same gradient."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from amortlm import LanguageModel

paper_loop = importlib.import_module("benchmarks.paper_loop")
speed = importlib.import_module("benchmarks.speed")
speed_case = importlib.import_module("benchmarks.speed_case")

SMALL = {"prompts": 2, "samples": 3, "tokens": 5, "rank": 2, "model": "tiny"}


@pytest.fixture
def tiny(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """`speed_case` on a model of two layers, with stories that fit its context."""
    stories = [{"x": "the cat ran.", "y": "a dog."}, {"x": "a dog.", "y": "the cat ran."}]
    monkeypatch.setattr(speed_case, "load", lambda *_: one_lm)
    monkeypatch.setattr(speed_case, "STORIES", stories)


@pytest.mark.parametrize("full_length", [False, True])
@pytest.mark.parametrize("task", speed_case.TASKS)
def test_paper_loop_has_the_loss_and_gradient_of_the_trainer(tiny, tmp_path, task, full_length):
    trainer = speed_case.build(speed_case.Case(task=task, full_length=full_length, **SMALL), str(tmp_path))
    rows = list(trainer.train_dataset)
    experience = trainer.source.collect(rows, (0, 0))
    batch = speed_case.paper_batch(trainer, experience.rollouts)
    parameters = [p for p in trainer.policy.parameters() if p.requires_grad]

    ours = trainer.compute_loss(trainer.policy, experience)
    ours_gradient = torch.autograd.grad(ours, parameters)
    for pass_per_prefix in (True,) if task == "infilling" else (True, False):
        theirs = paper_loop.loss(trainer.policy.model, trainer.lm.model, batch, pass_per_prefix)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        for a, b in zip(torch.autograd.grad(theirs, parameters), ours_gradient, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)
    other = replace(batch, weight=1.1 * batch.weight)
    assert abs(paper_loop.loss(trainer.policy.model, trainer.lm.model, other) - ours) > 1e-2


def test_phases_add_up_to_the_update(tiny, tmp_path):
    update = speed_case.Update(speed_case.build(speed_case.Case(task="infilling", **SMALL), str(tmp_path)))
    update()
    asked = []
    score = update.trainer.training_target.target.score
    update.trainer.training_target.target.score = lambda rollouts: asked.append(1) or score(rollouts)
    update()
    assert asked, "nothing is known of the completions of an update"
    assert set(update.seconds) == {*speed_case.PHASES.values(), "optimiser", "rest"}
    assert all(len(seconds) == 2 for seconds in update.seconds.values())


def test_growth_has_the_exponent_of_the_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed, "clock", lambda: now[0])

    def offer(case, size):
        return lambda: now.__setitem__(0, now[0] + 3 * size**1.5)

    monkeypatch.setattr(speed, "_offer", offer)
    found = speed.measure_growth(speed_case.Case(), "buffer", (10, 20, 40), 5)
    assert found["exponent"] == pytest.approx(1.5)
    assert found["last_doubling"] == pytest.approx(1.5)


def test_every_mode_writes_its_table_and_json(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        speed, "SIZES", {"tokens": (3, 4), "buffer": (3, 6), "context": (2, 3), "suffix": (2, 3)}
    )
    peaks = iter([{"loaded": 100.0, "peak": 130.0}, {"loaded": 100.0, "peak": 220.0}])
    monkeypatch.setattr(speed, "_peak_of_process", lambda *_: next(peaks))
    sizes = [
        "--models",
        "tiny",
        "--prompts",
        "2",
        "--samples",
        "2",
        "--tokens",
        "4",
        "--rank",
        "2",
        "--repeats",
        "1",
        "--rows",
        "2",
        "--updates",
        "4",
    ]
    for what, ratio in (
        ("update", "update / floor"),
        ("growth", "exponent"),
        ("memory", "update / paper"),
        ("training", "paper / update"),
    ):
        path = tmp_path / f"{what}.json"
        speed.main([what, *sizes, "--tasks", "infilling", "--axes", "tokens", "--json", str(path)])
        assert ratio in capsys.readouterr().out
        (result,) = json.loads(path.read_text())["results"]
        assert result["case"]["task"] == "infilling"
        if what == "memory":
            assert result["update / paper"] == 0.25
    assert 0 < result["judged"] < 1


def test_texts_have_the_asked_lengths(tiny):
    lm = speed_case.load("tiny", "cpu", "float32")
    rows = speed_case._rows(speed_case.Case(task="infilling", model="tiny", context=7, suffix=4), lm, 2)
    lengths = [[len(lm.encode_continuation(row[c])) for c in ("x", "y")] for row in rows]
    assert lengths == [[7, 4]] * 2
    assert len({row["x"] for row in rows}) == 2
