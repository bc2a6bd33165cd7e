"""Completions reach the terminal and the trackers, whatever they contain."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import ROWS, make_trainer

from amortlm import LanguageModel
from amortlm.train import trackers

SETTINGS: dict[str, Any] = {"rows": ROWS[:2], "diagnose_steps": 2}
EVIL = "<b>|\n`x`"


def test_tensorboard_has_figures_and_tables(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(one_lm, tmp_path / "run", **SETTINGS, report_to="tensorboard")
    trainer.train()
    folder = next((tmp_path / "board").rglob("events.out*")).parent
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    assert {"train/ess", "train/elbo", "train/fresh_log_w_variance"} <= set(events.Tags()["scalars"])
    tables = events.Tensors("samples/text_summary")
    assert [table.step for table in tables] == [0, 2, 4]
    last = tables[-1].tensor_proto.string_val[0].decode()
    for sample in trainer.posterior.sample(ROWS[0], 64, seed=("diagnose", 42))[:4]:
        assert f"{sample.log_q:.2f}" in last
        assert sample.text.strip() in last
    assert last.count("\n") == 1 + 2 * 4


class Run:
    """What a tracker's module offers."""

    run = object()

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def Table(self, **given: Any) -> dict[str, Any]:  # noqa: N802
        return given


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_tables_of_other_trackers(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interface that their documentation states; the packages are not installed here."""
    found = [("{}", EVIL, -1.0, -2.0, 0.5), ("{}", "b", -1.5, None, None)]
    module: Any = Run()
    monkeypatch.setitem(sys.modules, tracker, module)
    args: Any = SimpleNamespace(disable_tqdm=True, report_to=[tracker])
    trackers.show(args, [], 7, found)
    (values,) = module.logged
    assert values["train/global_step"] == 7
    table = values["samples"]
    if tracker == "wandb":
        frame = pd.DataFrame(table["data"], columns=table["columns"])
    else:
        frame = table["dataframe"]
    assert list(frame.columns) == list(trackers.COLUMNS)
    assert frame["completion"].tolist() == [EVIL, "b"]
    assert frame["log q"].tolist() == [-1.0, -1.5]
    args.report_to = []
    trackers.show(args, [], 8, found)
    assert len(module.logged) == 1


def test_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    args: Any = SimpleNamespace(disable_tqdm=False, report_to=[])
    trackers.show(args, [], 5, [("{}", f" {EVIL}  " + "long " * 40, -1.0, -2.0, 0.25)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 5"
    assert lines[3].startswith("<b>| `x` long")
    assert lines[3].split()[-3:] == ["-1.00", "-2.00", "0.25"]
    assert max(map(len, lines)) < 100


def test_text_in_markdown_is_text() -> None:
    table = trackers.text([("{}", EVIL, -1.0, -2.0, 0.5)], "github")
    assert table.count("\n") == 2
    assert table.splitlines()[2].count("|") == len(trackers.COLUMNS) + 1
    assert "<b>" not in table
