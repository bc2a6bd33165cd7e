"""What a run leaves for readers: results.json, digest.json, README.md and the table on the screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from amortlm.errors import ConfigError
from amortlm.files import write_text
from amortlm.lab.experiment import Experiment, Metric, Results, Run, Runs
from amortlm.lab.store import finite, read_json, write_json

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
MISSING = "–"
LEFT_OUT = (
    "key",
    "method",
    "records",
    "command",
    "environment",
)  # said elsewhere, or left in the run's own file


def collect(
    experiment: Experiment, identity: dict[str, Any], command: str, done: dict[tuple[str, int], Run]
) -> Results:
    """All finished runs as JSON: what was asked, the runs (methods in the order of the table, seeds ascending) without
    their records, mean and standard deviation over seeds, the paper's figures and the digest of the records.

    made: the different commands and environments; a run has the number of its own."""
    runs: Runs = {
        method: [done[m, seed] for m, seed in sorted(done) if m == method]
        for method in experiment.methods
        if any(m == method for m, _ in done)
    }
    made: list[dict[str, Any]] = []
    told: Runs = {method: [] for method in runs}
    for method, found in runs.items():
        for run in found:
            how = {"command": run["command"], "environment": run["environment"]}
            if how not in made:
                made.append(how)
            kept = {k: v for k, v in run.items() if k not in LEFT_OUT}
            told[method].append({**kept, "made": made.index(how)})
    return {
        **identity,
        "question": experiment.question,
        "command": command,
        "made": made,
        "summary": {
            method: {name: spread([r["metrics"][name] for r in found]) for name in experiment.metrics}
            for method, found in runs.items()
        },
        "paper": {"setting": experiment.paper_setting, "figures": dict(experiment.paper)},
        **({"digest": finite(experiment.digest(runs))} if experiment.digest and runs else {}),
        "runs": told,
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None for one value) of the figures that are numbers."""
    known = [v for v in values if v is not None]
    if not known:
        return {"mean": None, "sd": None}
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return {"mean": mean, "sd": None}
    return {"mean": mean, "sd": math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))}


def write_report(experiment: Experiment, results: Results, folder: Path) -> None:
    """results.json, its digest as digest.json, then the figures, then the README.md that shows them."""
    write_json(folder / "results.json", {k: v for k, v in results.items() if k != "digest"})
    if "digest" in results:
        write_json(folder / "digest.json", results["digest"])
    figures = experiment.figures(results, folder) if results["runs"] else []
    text = experiment.readme(results) if experiment.readme else readme(experiment, results, figures)
    write_text(folder / "README.md", text)


def report_again(experiment: Experiment, folder: Path) -> Results:
    """README.md and figures from the results.json and digest.json that a folder holds. Raises ConfigError where there
    are none, or those of an earlier version."""
    results = read_json(folder / "results.json")
    digest = read_json(folder / "digest.json")
    if results is None or results.get("experiment") != experiment.name:
        raise ConfigError(f"{folder} holds no results.json of {experiment.name}; give its folder as --output")
    if "made" not in results or (experiment.digest and results["runs"] and digest is None):
        raise ConfigError(
            f"{folder} holds a results.json of an earlier version, or lacks its digest.json; the command that made it "
            "writes both again where its runs/ is still there"
        )
    if digest is not None:
        results["digest"] = digest
    write_report(experiment, results, folder)
    return results


def readme(experiment: Experiment, results: Results, figures: Sequence[str]) -> str:
    seeds = max((len(found) for found in results["runs"].values()), default=0)
    parts = [
        f"# {experiment.name}, preset {results['preset']}",
        experiment.question,
        code(commands(results)),
        f"Model: {results['model']}. "
        + (f"Data: {results['data']}. " if results["data"] else "")
        + (f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."),
        table(experiment, results, "github"),
        experiment.summary(results) if experiment.summary and results["runs"] else "",
        f"The paper (Hu et al. 2024): {experiment.paper_setting}" if experiment.paper_setting else "",
        paper_table(experiment) if experiment.paper else "",
        *(f"![{name}]({name})" for name in figures),
        "Columns (↑ higher is better, ↓ lower is better):" if experiment.rows == "methods" else "",
        "\n".join(columns(experiment)),
        "Made with:",
        "\n".join(f"- {line}" for line in environments(results)),
        "Every figure, all settings and all seeds: [results.json](results.json). If the command is interrupted, give "
        "it again: finished runs are not repeated.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def code(lines: Iterable[str]) -> str:
    return "```bash\n" + "\n".join(lines) + "\n```"


def table(experiment: Experiment, results: Results, style: str = "simple") -> str:
    """Mean ± standard deviation over seeds of each metric: a row for each method, with times and reward evaluations, or
    a row for each metric."""
    summary, metrics = results["summary"], experiment.metrics
    if experiment.rows == "metrics":
        lines = [
            [metric.label, *(with_spread(of[name], metric) for of in summary.values())]
            for name, metric in metrics.items()
        ]
        return grid(["", *summary], lines, style)
    lines = [
        [
            method,
            *(with_spread(summary[method][name], metric) for name, metric in metrics.items()),
            *(_mean_seconds(found, part) for part in ("training", "evaluation")),
            f"{max(run['reward_evaluations'] for run in found):,}",
            str(len(found)),
        ]
        for method, found in results["runs"].items()
    ]
    costs = ["training, s", "evaluation, s", "reward evaluations", "seeds"]
    return grid(["method", *_headings(experiment), *costs], lines, style)


def paper_table(experiment: Experiment) -> str:
    lines = [
        [method, *(values.get(name, MISSING) for name in experiment.metrics)]
        for method, values in experiment.paper.items()
    ]
    return grid(["method", *_headings(experiment)], lines)


def grid(headers: Sequence[str], lines: Sequence[Sequence[Any]], style: str = "github", left: int = 1) -> str:
    """A table, by default as Markdown. The first `left` columns hold words, the others figures."""
    if style == "github":  # a bar would end a cell
        headers, *lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (headers, *lines)]
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(
        lines, headers=headers, tablefmt=style, colalign=align if lines else None, disable_numparse=True
    )


def commands(results: Results) -> list[str]:
    """The commands that made the runs, each once."""
    return list(dict.fromkeys(how["command"] for how in results["made"])) or [results["command"]]


def columns(experiment: Experiment) -> list[str]:
    described = [
        f"- {metric.label}{ARROWS[metric.better]}: {metric.meaning}"
        for metric in experiment.metrics.values()
        if metric.meaning
    ]
    if experiment.rows == "metrics":
        return described
    return [
        *described,
        "- training, evaluation: wall-clock seconds of one seed (*: went on from a checkpoint, the last part only)",
        "- reward evaluations: completions that the target or a reward judged in training, per seed",
        "- seeds: finished runs",
    ]


def environments(results: Results) -> list[str]:
    """One line for each place that runs were made in."""
    lines = []
    for made in (how["environment"] for how in results["made"]):
        packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
        where = made["gpu"] or f"{made['cpu']}, {made['cores']} cores, {made['threads']} threads"
        commit = f"; commit {made['commit']}" if made["commit"] else ""
        lines.append(f"{where}; Python {made['python']}; {packages}{commit}")
    return list(dict.fromkeys(lines))


def progress_line(experiment: Experiment, run: Run, seconds_left: float | None) -> str:
    figures = ", ".join(
        f"{metric.label} {number(run['metrics'][name], metric)}"
        for name, metric in experiment.metrics.items()
    )
    seconds = run["seconds"]
    line = (
        f"{run['method']}, seed {run['seed']}: {figures}  "
        f"({seconds['training']:.0f} s training, {seconds['evaluation']:.0f} s evaluation)"
    )
    return line if not seconds_left else f"{line}  about {_duration(seconds_left)} left"


def number(value: float | None, metric: Metric) -> str:
    return MISSING if value is None else format(value, metric.format)


def with_spread(summary: dict[str, float | None], metric: Metric) -> str:
    mean, sd = number(summary["mean"], metric), summary["sd"]
    return mean if sd is None else f"{mean} ± {format(sd, metric.spread or metric.format)}"


def _headings(experiment: Experiment) -> list[str]:
    return [metric.label + ARROWS[metric.better] for metric in experiment.metrics.values()]


def _mean_seconds(found: Sequence[Run], part: str) -> str:
    mean = math.fsum(run["seconds"][part] for run in found) / len(found)
    cut = part == "training" and any(run["resumed"] for run in found)
    return f"{mean:.1f}" + ("*" if cut else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
