"""Completions as a table, for the terminal and for the trackers of `report_to`; figures reach these through the log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from amortlm.train.config import GFNConfig
from amortlm.train.looks import EXAMPLES, Look
from amortlm.types import Row, to_json

NAME = "samples"
COLUMNS = ("prompt", "completion", "log q", "log R", "weight")
WIDTH = 60  # characters of a cell on a terminal
Line = tuple[str, str, float, float | None, float | None]


def lines(rows: Sequence[Row], looks: Sequence[Look]) -> list[Line]:
    """A few completions of each prompt, in the order of COLUMNS. log q, log R: nats."""
    return [
        (to_json(row), s.text, s.log_q, s.log_reward, s.weight)
        for row, look in zip(rows, looks, strict=True)
        for s in look.samples[:EXAMPLES]
    ]


def text(found: Sequence[Line], style: str) -> str:
    """The table in a style of tabulate; for a terminal without the prompts, which would fill it."""
    if style == "github":
        return tabulate([[_cell(v) for v in line] for line in found], COLUMNS, style, floatfmt=".2f")
    shown = [[_short(line[1]), *line[2:]] for line in found]
    return tabulate(shown, COLUMNS[1:], style, floatfmt=".2f", disable_numparse=[0])


def _cell(value: Any) -> Any:
    """In Markdown, where a completion may hold anything."""
    if not isinstance(value, str):
        return value
    return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")


def _short(completion: str) -> str:
    line = " ".join(completion.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 2]} …"


def show(args: GFNConfig, callbacks: Sequence[TrainerCallback], step: int, found: Sequence[Line]) -> None:
    """Show the table where people look: on a terminal that has a progress bar, and in each tracker that knows tables
    and has begun a run (TensorBoard, wandb, trackio)."""
    if not args.disable_tqdm:
        tqdm.write(f"step {step}\n{text(found, 'simple')}\n", file=sys.stderr)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, text(found, "github"), step)
    for tracker in {"wandb", "trackio"} & set(args.report_to or ()):
        module: Any = sys.modules.get(tracker)  # imported by its callback, which has begun the run
        if module is not None and (tracker == "trackio" or module.run is not None):
            table = _table(tracker, module, found)
            module.log({NAME: table, "train/global_step": step})


def _table(tracker: str, module: Any, found: Sequence[Line]) -> Any:
    if tracker == "wandb":
        return module.Table(columns=[*COLUMNS], data=[[*line] for line in found])
    import pandas as pd  # comes with datasets

    return module.Table(dataframe=pd.DataFrame(found, columns=[*COLUMNS]))
