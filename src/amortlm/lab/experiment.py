"""What an experiment is: settings, methods, what is measured of them, and how it is reported. Each module in
`lab/experiments` defines one as `EXPERIMENT`, and so do recipes and the benchmark of posteriors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

Settings = dict[str, Any]  # JSON: one preset of an experiment, overridden from the command line
Run = dict[str, Any]  # JSON: a finished run of a method with a seed
Runs = dict[str, list[Run]]  # by method: its finished runs, seeds ascending
Results = dict[str, Any]  # JSON: all finished runs, as in results.json and digest.json


@dataclass(frozen=True)
class Metric:
    """label: column heading; format: as in `format()`; better: "higher", "lower" or None; meaning: for the report;
    spread: format of the standard deviation, by default that of the mean."""

    label: str
    format: str = ".3f"
    better: str | None = None
    meaning: str = ""
    spread: str | None = None


@dataclass(frozen=True)
class Context:
    """What a method, and then `evaluate`, works with.

    data      whatever the experiment's `prepare` returned
    dry_run   build everything, train nothing: a method returns before its first step
    seed      of this run
    folder    for checkpoints and logs of this run alone
    """

    settings: Settings
    lm: LanguageModel
    data: Any = None
    dry_run: bool = False
    seed: int = 0
    folder: Path = Path()


@dataclass(frozen=True)
class Trained:
    """What a method made. sampler: what the experiment's `evaluate` takes (a Posterior, say).

    reward_evaluations: completions scored by the target, or by a reward, while training.
    """

    sampler: Any
    reward_evaluations: int = 0


@dataclass(frozen=True)
class Outcome:
    """metrics: one figure for each of the experiment's metrics; details: JSON for results.json, from which tables and
    figures are made; records: JSON for the file of the run alone, such as the figures of single examples (see
    `Experiment.digest`)."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Context], Trained]


@dataclass(frozen=True)
class Experiment:
    """name, question: for the report. presets: settings by name; "small" is what runs unless another is asked for.

    prepare   (settings, model, data) -> `Context.data`; data: the path given as --data, or None. Raises DataError and
              ConfigError
    reads_data  may --data be given?
    methods   by name, in the order of the table
    evaluate  (context, trained) -> Outcome
    groups    settings that are the fields of a dataclass (GFNConfig, say): `--set GROUP.FIELD` reaches all of them,
              whether or not the preset lists them
    once      methods in which nothing is random, so that they run with one seed only
    digest    runs -> results["digest"]: JSON, what tables and figures need of the records; written to digest.json
    figures   (results, folder) -> names of the PNG files it wrote. In `results`, results["runs"][method] is a list
              over seeds of {"seed", "metrics", "details", "seconds", ...}; methods that are not finished are absent,
              and a figure that is not finite is None
    summary   results -> Markdown below the table: comparisons, and where a claim does not hold
    rows      what is a row of the table: a method, or a metric (then without times)
    readme    results -> the whole README.md, instead of `report.readme`
    paper     the paper's figures: method as named there -> metric -> figure as printed there
    """

    name: str
    question: str
    presets: Mapping[str, Settings]
    methods: Mapping[str, Method]
    evaluate: Callable[[Context, Trained], Outcome]
    metrics: Mapping[str, Metric]
    prepare: Callable[[Settings, LanguageModel, Path | None], Any] = lambda settings, lm, data: None
    reads_data: bool = False
    groups: Mapping[str, type] = field(default_factory=dict)
    once: frozenset[str] = frozenset()
    digest: Callable[[Runs], dict[str, Any]] | None = None
    figures: Callable[[Results, Path], list[str]] = lambda results, folder: []
    summary: Callable[[Results], str] | None = None
    rows: Literal["methods", "metrics"] = "methods"
    readme: Callable[[Results], str] | None = None
    paper: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    paper_setting: str = ""
