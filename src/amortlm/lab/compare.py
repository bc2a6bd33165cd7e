"""Methods side by side: paired tests on the examples they share, and plots of several metrics.

A run's `records[metric]` holds a figure of each example. They stay in the file of the run; a digest keeps what tables
and figures need of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amortlm.lab.experiment import Runs
from amortlm.lab.metrics.paired import paired_test
from amortlm.lab.report import grid


def per_example(runs: Runs, method: str, metric: str) -> list[float]:
    """Each example's figure, mean over seeds; an empty list for a method without figures of examples."""
    found = [run["records"].get(metric, []) for run in runs.get(method, [])]
    return [sum(values) / len(values) for values in zip(*found, strict=True) if None not in values]


def paired_digest(
    runs: Runs, pairs: Iterable[tuple[str, str]], metrics: Iterable[str]
) -> list[dict[str, Any]]:
    """Mean difference of two methods, its 95 % interval and the p-value of a sign-flip test, on the examples that they
    share: for each pair and metric where there are some."""
    out = []
    for a, b in pairs:
        for metric in metrics:
            x, y = per_example(runs, a, metric), per_example(runs, b, metric)
            if x and len(x) == len(y):
                out.append({"pair": [a, b], "metric": metric, **asdict(paired_test(x, y))})
    return out


def paired_table(paired: list[dict[str, Any]], labels: Mapping[str, str], unit: str) -> str:
    """Markdown of `paired_digest`."""
    if not paired:
        return ""
    lines = []
    for test in paired:
        difference, low, high = (f"{round(test[k], 9) + 0.0:+.3g}" for k in ("difference", "low", "high"))
        names = [" − ".join(test["pair"]), labels[test["metric"]]]
        lines.append([*names, difference, f"{low} to {high}", f"{test['p_value']:.2g}", test["n"]])
    headers = ["difference", "metric", "mean", "95 % interval", "p (sign flips)", unit]
    return f"Paired, mean over seeds:\n\n{grid(headers, lines, left=2)}"


def shared_digest(runs: Runs, metrics: Iterable[str]) -> dict[str, Any] | None:
    """Means over the examples that every method saw, which are the first; None where all saw equally many."""
    found = {method: {m: per_example(runs, method, m) for m in metrics} for method in runs}
    sizes = {len(next(iter(values.values()))) for values in found.values()}
    n = min(sizes)
    means = {method: {m: sum(v[:n]) / n for m, v in of.items()} for method, of in found.items()}
    return {"examples": n, "means": means} if len(sizes) > 1 else None


def shared_table(shared: dict[str, Any] | None, labels: Mapping[str, str], unit: str) -> str:
    """Markdown of `shared_digest`."""
    if shared is None:
        return ""
    lines = [[method, *(f"{of[m]:.2f}" for m in labels)] for method, of in shared["means"].items()]
    table = grid(["method", *labels.values()], lines)
    return f"Of these, the first {shared['examples']} {unit}, which every method saw:\n\n{table}"


def boxes_digest(runs: Runs, metrics: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Each method's spread over examples: metric -> method -> mean, quartiles, whiskers."""
    from matplotlib.cbook import boxplot_stats

    kept = ("mean", "med", "q1", "q3", "whislo", "whishi")
    out: dict[str, dict[str, dict[str, float]]] = {}
    for metric in metrics:
        found = {method: per_example(runs, method, metric) for method in runs}
        stats = {method: boxplot_stats(values)[0] for method, values in found.items() if values}
        out[metric] = {method: {k: float(of[k]) for k in kept} for method, of in stats.items()}
    return out


def box_figure(boxes: dict[str, Any], labels: Mapping[str, str], path: Path) -> list[str]:
    """One panel per metric (name -> axis label) of `boxes_digest`."""
    from amortlm.plots import AFTER, INK, SMALL, TEXT, panels, save, style

    fig, axes = panels(len(labels), len(labels), (5.2, 3.6))
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        ax.bxp(
            [{"label": method, **of} for method, of in boxes[metric].items()],
            showmeans=True,
            showfliers=False,
            medianprops={"color": AFTER, "linewidth": 1.8},
            meanprops={"marker": "D", "markerfacecolor": INK, "markeredgecolor": INK, "markersize": 4},
        )
        ax.set_ylabel(label, fontsize=TEXT, color=INK)
        style(ax)
        ax.tick_params(axis="x", rotation=25, labelsize=SMALL)
    return save(fig, path)


def line_figure(
    series: Mapping[str, Mapping[int, Mapping[str, float | None]]], xlabel: str, ylabel: str, path: Path
) -> list[str]:
    """Methods as lines: series[method][x] = {"mean", "sd"}. A method without all its means has no line."""
    from amortlm.plots import INK, SMALL, TEXT, new_figure, save, style

    series = {m: of for m, of in series.items() if of and all(v["mean"] is not None for v in of.values())}
    fig = new_figure(6.4, 4.2)
    ax = fig.subplots()
    markers = "osD^vPX*<>"
    ticks = sorted({x for points in series.values() for x in points})
    step = 0.012 * (ticks[-1] - ticks[0]) if ticks else 0.0  # equal methods stand side by side
    for i, (method, points) in enumerate(series.items()):
        ax.errorbar(
            [x + step * (i - (len(series) - 1) / 2) for x in sorted(points)],
            [points[x]["mean"] or 0.0 for x in sorted(points)],
            yerr=[points[x]["sd"] or 0.0 for x in sorted(points)],
            label=method,
            marker=markers[i % len(markers)],
            capsize=2,
            linewidth=1.5,
        )
    ax.set_xticks(ticks)
    ax.set_xlabel(xlabel, fontsize=TEXT, color=INK)
    ax.set_ylabel(ylabel, fontsize=TEXT, color=INK)
    style(ax)
    ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    return save(fig, path)
