"""The picture of `make demo`: samplers before and after training. Logs are in nats; before = the untrained policy.

Each panel function draws on a matplotlib `Axes` that the caller owns; `demo_figure` composes them into one PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amortlm.errors import DataError
from amortlm.plots import (
    AFTER,
    BEFORE,
    DPI,
    INK,
    SERIES_COLOURS,
    SMALL,
    TEXT,
    TITLE,
    new_figure,
    save,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


@dataclass(frozen=True)
class NumbersData:
    """The random-integer task: a posterior that is known exactly (uniform).

    before, after              [101] probability of each integer 0..100; the rest to 1 is invalid text
    kl_before, kl_after        KL from the posterior, nats
    valid_before, valid_after  probability of a valid integer, 0..1
    steps, curve               training curve: optimizer steps and a positive value at each
    curve_label                what the curve shows, with its unit: "KL to uniform (nats)"
    """

    before: Sequence[float]
    after: Sequence[float]
    kl_before: float
    kl_after: float
    valid_before: float
    valid_after: float
    steps: Sequence[float]
    curve: Sequence[float]
    curve_label: str


@dataclass(frozen=True)
class InfillingData:
    """The infilling task: a posterior that is known up to log Z.

    log_w_before, log_w_after  log importance weights of samples of q, a list per prompt
    steps                      optimizer steps of the two curves
    ess                        effective sample size / number of samples at each step, 0..1
    log_w_variance             variance of log_w among the samples of a prompt, nats^2
    metrics                    name -> (before, after), e.g. {"log Z gap (nats)": (5.1, 0.8)}; at most 7 or so
    """

    log_w_before: Sequence[Sequence[float]]
    log_w_after: Sequence[Sequence[float]]
    steps: Sequence[float]
    ess: Sequence[float]
    log_w_variance: Sequence[float]
    metrics: Mapping[str, tuple[float, float]]


def numbers_histogram(
    ax: Axes, before: Sequence[float], after: Sequence[float], uniform: bool = True
) -> None:
    """Probability of each integer 0, 1, ... before and after; `uniform` draws the exact posterior 1/n."""
    edges = np.arange(len(after) + 1) - 0.5
    ax.stairs(before, edges, fill=True, color=BEFORE, alpha=0.75, label="before training")
    ax.stairs(after, edges, fill=True, color=AFTER, alpha=0.2)
    ax.stairs(after, edges, color=AFTER, linewidth=1.7, label="after training")
    if uniform:
        posterior = 1 / len(after)
        label = f"exact posterior, 1/{len(after)}"
        ax.axhline(posterior, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    ax.set(xlim=(edges[0], edges[-1]), xlabel="integer", ylabel="probability")
    ax.set_ylim(0, 1.12 * max(*before, *after, 1e-9))
    style(ax)
    ax.legend(frameon=False, fontsize=SMALL, loc="upper right", labelcolor=INK)


def curve(
    ax: Axes,
    steps: Sequence[float],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    log: bool = False,
) -> None:
    """Values against optimizer steps. With `log` the axis is logarithmic and values <= 0 leave gaps."""
    for (name, values), colour in zip(series.items(), cycle(SERIES_COLOURS), strict=False):
        shown = np.asarray(values, float)
        if log:
            shown = np.where(shown > 0, shown, np.nan)
        marker = "o" if len(steps) <= 25 else None
        ax.plot(steps, shown, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=name)
    ax.set(xlabel="optimizer step", ylabel=ylabel)
    if log:
        ax.set_yscale("log")
        _plain_log_ticks(ax)
    style(ax)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK)


def log_weight_histogram(
    ax: Axes, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> None:
    """Histograms of log_w - log Z-hat, with Z-hat the mean weight of the same prompt's samples.

    before, after: log importance weights, a list per prompt. A sampler equal to the posterior is a spike at
    0. The outermost bars also hold the 1% beyond them, and weights of zero.
    """
    old, new = centred(before), centred(after)
    low, high = _range(old, new)
    bins = np.linspace(low, high, 46)
    for values, colour, name in ((old, BEFORE, "before"), (new, AFTER, "after")):
        share = np.histogram(np.clip(values, low, high), bins)[0] / len(values)
        ax.stairs(share, bins, fill=True, color=colour, alpha=0.45, label=name)
        ax.stairs(share, bins, color=colour, linewidth=1.3)
    ax.axvline(0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="exact sampler")
    ax.set(xlim=(low, high), xlabel="log importance weight − log Ẑ (nats)", ylabel="share of samples")
    style(ax)
    ax.legend(frameon=False, fontsize=SMALL, loc="upper left", labelcolor=INK)


def metric_bars(ax: Axes, metrics: Mapping[str, tuple[float, float]]) -> None:
    """Before and after bars of metrics with different units: each row has a scale of its own, from 0."""
    for row, (name, pair) in enumerate(metrics.items()):
        sizes = [
            value if np.isfinite(value) else 0.0 for value in pair
        ]  # nan and inf are shown as a number without a bar
        low, high = min(0.0, *sizes), max(0.0, *sizes)
        scale = (high - low) or 1.0
        for value, size, colour, shift in zip(pair, sizes, (BEFORE, AFTER), (0.0, 0.26), strict=True):
            ax.barh(row + shift, size / scale, left=-low / scale, height=0.24, color=colour)
            end = (max(size, 0.0) - low) / scale + 0.02
            ax.text(end, row + shift, _number(value), va="center", fontsize=SMALL, color=INK)
        ax.text(0, row - 0.29, name, va="center", fontsize=TEXT, color=INK)
    ax.set(xlim=(0, 1.2), ylim=(len(metrics) - 0.5, -0.5), xticks=[], yticks=[])
    style(ax, frame=())


def centred(log_w: Sequence[Sequence[float]]) -> np.ndarray:
    """All log weights in one array, each minus the log-mean-exp of the weights of its prompt."""
    groups = []
    for values in log_w:
        group = np.asarray(values, float)
        largest = group.max()
        if not np.isfinite(largest):
            raise DataError(
                "log weights of a prompt are all -inf, or hold nan or inf: no weight to compare with"
            )
        groups.append(group - largest - np.log(np.exp(group - largest).mean()))
    return np.concatenate(groups)


def demo_figure(
    numbers: NumbersData, infilling: InfillingData, path: Path, width: int = 1600, height: int = 960
) -> None:
    """One PNG of width x height pixels with both tasks, before and after."""
    fig = new_figure(width / DPI, height / DPI)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.07)  # type: ignore[union-attr, call-arg]
    rows = fig.subfigures(2, 1, squeeze=False, hspace=0.04)
    _numbers_row(rows[0, 0], numbers)
    _infilling_row(rows[1, 0], infilling)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(fig, path)


def _numbers_row(fig: SubFigure, data: NumbersData) -> None:
    _heading(
        fig, "Random integers", "asked for a uniform integer from 0 to 100, trained to sample that posterior"
    )
    left, right = fig.subplots(1, 2, width_ratios=(2.1, 1))
    numbers_histogram(left, data.before, data.after)
    kl = f"KL to uniform {_number(data.kl_before)} → {_number(data.kl_after)} nats"
    valid = f"valid integers {_percent(data.valid_before)} → {_percent(data.valid_after)}"
    _title(left, f"{kl},  {valid}")
    label, values = data.curve_label, data.curve
    curve(right, data.steps, {label: values}, label, log=all(v > 0 for v in values))
    name = label.split(" (")[0]
    _title(right, f"{name} {_number(values[0])} → {_number(values[-1])}{_steps(data.steps)}")


def _infilling_row(fig: SubFigure, data: InfillingData) -> None:
    _heading(fig, "Infilling", "the middle of a story, given its beginning and its ending")
    grid = fig.add_gridspec(2, 3, width_ratios=(1.05, 1, 1))
    weights = fig.add_subplot(grid[:, 0])
    old, new = data.log_w_before, data.log_w_after
    log_weight_histogram(weights, old, new)
    _title(weights, f"Spread of log weights {_number(_spread(old))} → {_number(_spread(new))} nats (std)")

    ess, variance = fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, 1])
    curve(ess, data.steps, {"ESS": data.ess}, "ESS / samples")
    ess.set(ylim=(0, 1), yticks=(0, 0.5, 1), xlabel="")
    ess.tick_params(labelbottom=False)
    change = f"{_percent(data.ess[0])} → {_percent(data.ess[-1])}"
    _title(ess, f"ESS {change} of samples{_steps(data.steps)}")
    curve(variance, data.steps, {"variance": data.log_w_variance}, "Var log w (nats²)", log=True)

    bars = fig.add_subplot(grid[:, 2])
    metric_bars(bars, data.metrics)
    _title(bars, "Before and after (each row on its own scale)")


def _range(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Axis limits that hold 99% of the finite values of each, and 0."""
    both = [v[np.isfinite(v)] for v in (old, new)]
    low = min(float(np.quantile(v, 0.005)) for v in both)
    high = max(float(np.quantile(v, 0.995)) for v in both)
    margin = 0.04 * (high - low) + 0.05
    return min(low - margin, -0.5), max(high + margin, 0.5)


def _spread(log_w: Sequence[Sequence[float]]) -> float:
    """Standard deviation of a prompt's finite log weights, median over prompts."""
    groups = [np.asarray(values, float) for values in log_w]
    return float(np.median([g[np.isfinite(g)].std() for g in groups]))


def _plain_log_ticks(ax: Axes) -> None:
    """0.1, 1, 10 in place of powers of ten; ticks between them when the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_ylim()
    subs = (1.0,) if high / low > 30 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _heading(fig: SubFigure, name: str, what: str) -> None:
    bold = "$\\bf{" + name.replace(" ", "\\ ") + "}$"
    fig.suptitle(f"{bold}:  {what}", x=0.01, ha="left", fontsize=13, color=INK)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=TITLE, color=INK)


def _steps(steps: Sequence[float]) -> str:
    return f" in {steps[-1]:,.0f} steps"


def _number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if value == 0 or not np.isfinite(value):
        text = f"{value:g}"
    elif 1e-4 <= abs(value) < 1000:
        text = f"{value:.3g}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def _percent(share: float) -> str:
    digits = 4 if 0.99 < share < 1 else 2  # 99.97% is not 100%
    return f"{100 * share:.{digits}g}%" if share < 1 else f"{100 * share:.0f}%"
