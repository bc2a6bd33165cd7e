"""What an experiment is: settings, methods, metrics, and the paper's own figures. Each module beside this one
states one of the five as `EXPERIMENT`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.settings import load_yaml

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

Settings = dict[str, Any]  # JSON: one preset of an experiment, overridden from the command line


def read_presets(name: str) -> dict[str, Settings]:
    """The presets of an experiment: `lab/presets/NAME.yaml`."""
    file = Path(__file__).parents[1] / "presets" / f"{name}.yaml"
    return load_yaml(file.read_text(encoding="utf-8"), str(file))


@dataclass(frozen=True)
class Metric:
    """label: column heading; format: as in `format()`; better: "higher", "lower" or None; meaning: for the report."""

    label: str
    format: str = ".3f"
    better: str | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Context:
    """What every method of a run shares. data: whatever the experiment's `prepare` made of its files.

    dry_run: build everything, train nothing (a method returns before its first step).
    """

    settings: Settings
    lm: LanguageModel
    data: Any
    dry_run: bool = False


@dataclass(frozen=True)
class Trained:
    """What a method made. sampler: what the experiment's `evaluate` takes (a Posterior, say).

    reward_evaluations: completions scored by the target, or by a reward, while training.
    """

    sampler: Any
    reward_evaluations: int = 0


@dataclass(frozen=True)
class Outcome:
    """metrics: one figure for each of the experiment's metrics; details: JSON that the figures draw."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """name, question: for the report. presets: settings of "smoke", "small" and "paper".

    prepare   (settings, model, data, dry_run) -> Context: loads model and data, raises DataError and ConfigError;
              model and data: as on the command line, or None for the preset's
    methods   name -> (context, seed, folder) -> Trained; the order is that of the table
    evaluate  (context, trained, seed) -> Outcome
    figures   (results, folder) -> names of the PNG files it wrote. results: as in results.json, where
              results["runs"][method] is a list over seeds of {"seed", "metrics", "details", "seconds", ...}; methods
              that are not finished are absent, a figure that is not finite is None
    summary   results -> Markdown below the table: comparisons, and where a claim does not hold
    paper     the paper's figures: method as named there -> metric -> value
    """

    name: str
    question: str
    presets: dict[str, Settings]
    prepare: Callable[[Settings, str | None, Path | None, bool], Context]
    methods: dict[str, Callable[[Context, int, Path], Trained]]
    evaluate: Callable[[Context, Trained, int], Outcome]
    metrics: dict[str, Metric]
    figures: Callable[[dict[str, Any], Path], list[str]]
    paper: dict[str, dict[str, float]]
    paper_setting: str
    summary: Callable[[dict[str, Any]], str] | None = None
