"""Methods side by side: paired tests on the examples they share, and plots of several metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from amortlm.lab.metrics.paired import paired_test


def per_example(results: dict[str, Any], method: str, metric: str) -> list[float]:
    """Mean over seeds of each example's figure: details["per_example"][metric] of a method's runs."""
    runs = [run["details"]["per_example"][metric] for run in results["runs"][method]]
    return [sum(values) / len(values) for values in zip(*runs, strict=True) if None not in values]


def paired_table(
    results: dict[str, Any],
    *,
    pairs: Sequence[tuple[str, str]],
    metrics: Mapping[str, str],
    unit: str,
) -> str:
    """Markdown: mean difference of two methods, its 95 % interval and the p-value of a sign-flip test, on the
    examples they share."""
    lines = []
    for a, b in pairs:
        if a not in results["runs"] or b not in results["runs"]:
            continue
        for metric, label in metrics.items():
            x, y = (per_example(results, m, metric) for m in (a, b))
            if not x or len(x) != len(y):
                continue
            test = paired_test(x, y)
            difference, low, high = (
                f"{round(x, 9) + 0.0:+.3g}" for x in (test.difference, test.low, test.high)
            )
            lines.append([f"{a} − {b}", label, difference, f"{low} to {high}", f"{test.p_value:.2g}", test.n])
    if not lines:
        return ""
    headers = ["difference", "metric", "mean", "95 % interval", "p (sign flips)", unit]
    align = ("left", "left", *["right"] * 4)
    return "Paired, mean over seeds:\n\n" + tabulate(
        lines, headers=headers, tablefmt="github", colalign=align, disable_numparse=True
    )


def shared_table(results: dict[str, Any], metrics: Mapping[str, str], unit: str) -> str:
    """Markdown: means over the first examples, those that every method saw; empty where all saw the same number."""
    found = {
        method: [per_example(results, method, metric) for metric in metrics]
        for method, runs in results["runs"].items()
        if runs
    }
    sizes = {len(values[0]) for values in found.values()}
    if len(sizes) < 2:
        return ""
    n = min(sizes)
    lines = [[method, *(f"{sum(v[:n]) / n:.2f}" for v in values)] for method, values in found.items()]
    align = ("left", *["right"] * len(metrics))
    table = tabulate(lines, ["method", *metrics.values()], "github", colalign=align, disable_numparse=True)
    return f"Of these, the first {n} {unit}, which every method saw:\n\n{table}"


def box_figure(results: dict[str, Any], panels: Mapping[str, str], path: Path) -> str:
    """One panel per metric (name -> axis label): each method's spread over examples. Returns the file's name."""
    from matplotlib.figure import Figure

    from amortlm.lab.plots import AFTER, DPI, INK, SMALL, TEXT, style

    fig = Figure(figsize=(5.2 * len(panels), 3.6), dpi=DPI, layout="constrained", facecolor="white")
    for ax, (metric, label) in zip(
        fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        found = {m: per_example(results, m, metric) for m in results["runs"]}
        found = {m: values for m, values in found.items() if values}
        ax.boxplot(
            list(found.values()),
            tick_labels=list(found),
            showmeans=True,
            showfliers=False,
            medianprops={"color": AFTER, "linewidth": 1.8},
            meanprops={"marker": "D", "markerfacecolor": INK, "markeredgecolor": INK, "markersize": 4},
        )
        ax.set_ylabel(label, fontsize=TEXT, color=INK)
        style(ax)
        ax.tick_params(axis="x", rotation=25, labelsize=SMALL)
    fig.savefig(path, format="png", metadata={"Software": None})
    return path.name


def line_figure(
    series: Mapping[str, Mapping[float, tuple[float, float]]], xlabel: str, ylabel: str, path: Path
) -> str:
    """Methods as lines: series[method][x] = (mean, standard deviation). Returns the file's name."""
    from matplotlib.figure import Figure

    from amortlm.lab.plots import DPI, INK, SMALL, TEXT, style

    fig = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    ax = fig.subplots()
    markers = "osD^vPX*<>"
    ticks = sorted({x for points in series.values() for x in points})
    step = 0.012 * (ticks[-1] - ticks[0]) if ticks else 0.0  # equal methods stand side by side
    for i, (method, points) in enumerate(series.items()):
        xs = sorted(points)
        means, spreads = [points[x][0] for x in xs], [points[x][1] for x in xs]
        ax.errorbar(
            [x + step * (i - (len(series) - 1) / 2) for x in xs],
            means,
            yerr=spreads,
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
    fig.savefig(path, format="png", metadata={"Software": None})
    return path.name
