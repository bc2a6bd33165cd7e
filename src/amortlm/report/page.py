"""The page: what the folders of runs say, in one HTML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.files import REPORT, write_text
from amortlm.report import charts
from amortlm.report.record import Json, RunRecord
from amortlm.report.verdict import Verdict, verdict

if TYPE_CHECKING:
    from jinja2 import Template

# Figures before and after: key of a look -> label, format, meaning.
FIGURES = {
    "ess": ("effective samples", "{:.1%}", "the share of the draws that count; 100 % for an exact sampler"),
    "elbo": ("ELBO, nats", "{:.2f}", "lower bound on log Z; equal to it for an exact sampler"),
    "log_w_variance": ("log-weight variance", "{:.2f}", "nats squared; 0 for an exact sampler"),
    "log_reward": ("mean log R, nats", "{:.2f}", "how good the completions are under the target"),
    "valid": ("accepted", "{:.1%}", "the share of draws that the target does not reject"),
    "distinct": ("different texts", "{:.0f}", "among the draws"),
}


@dataclass(frozen=True)
class Shown:
    """A run as the template shows it."""

    run: RunRecord
    verdict: Verdict
    figures: list[tuple[str, str, str]]  # label, before, after
    prompts: list[Json]
    weights: list[str]
    log_z: str


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one or several runs; returns its path, by default report.html in the folder of the first.

    Raises CheckpointError for a folder without a run, or with a damaged one."""
    path = Path(folders[0]) / REPORT if output is None else Path(output)
    write_text(path, report([RunRecord.read(folder) for folder in folders]))
    return path


def report(runs: Sequence[RunRecord]) -> str:
    """The page as text."""
    return _template().render(
        runs=[_shown(run) for run in runs],
        curves=charts.curves(runs),
        settings=_settings(runs),
        meanings=[(label, meaning) for label, _, meaning in FIGURES.values()],
        title=", ".join(run.name for run in runs),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("amortlm.report"),
        autoescape=True,  # rows and completions are anybody's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html")


def _shown(run: RunRecord) -> Shown:
    return Shown(
        run=run,
        verdict=verdict(run),
        figures=[
            (label, _mean(run.before, name, form), _mean(run.after, name, form))
            for name, (label, form, _) in FIGURES.items()
        ],
        prompts=_prompts(run),
        weights=charts.weights(run),
        log_z=charts.log_z_bounds(run),
    )


def _prompts(run: RunRecord) -> list[Json]:
    """Each diagnosed prompt with its completions before and after training."""
    before = {str(look["row"]): look["samples"] for look in run.before}
    measured: Sequence[Json | None] = run.diagnosis or [None] * len(run.after)
    return [
        {
            "row": look["row"],
            "before": before.get(str(look["row"]), []),
            "after": look["samples"],
            "measured": row,
        }
        for look, row in zip(run.after, measured, strict=False)
    ]


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any], bool]]:
    """(name, value in each run, do they differ), those that differ first."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name) for run in runs]) for name in names]
    told = [(name, values, any(v != values[0] for v in values)) for name, values in rows if any(values)]
    return sorted(told, key=lambda row: (not row[2], row[0]))


def _mean(looks: Sequence[Json], name: str, form: str) -> str:
    values = [look[name] for look in looks if look.get(name) is not None]
    if not values or len(values) < len(looks):
        return "–"
    return form.format(math.fsum(values) / len(values))


def number(value: Any, form: str = "{:.2f}") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else form.format(value)
