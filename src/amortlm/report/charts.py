"""The charts of a report, as SVG that takes its colours from the page, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from amortlm.plots import BEFORE, GRID, INK, MUTED, SERIES_COLOURS, SMALL, new_figure, panels, style
from amortlm.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (3.6, 2.3)  # inches of a chart
BINS = 30
# Colours of a chart -> CSS variables of the page.
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES_COLOURS)},
}
# Figures of the log -> what the chart says. The first ones come from fresh samples.
CURVES = {
    "ess": "effective samples (share), fresh draws",
    "elbo": "ELBO, nats, fresh draws",
    "fresh_log_w_variance": "log-weight variance, fresh draws",
    "gap": "gap, nats",
    "log_w_variance": "log-weight variance, training draws",
    "loss": "loss",
    "length": "length, tokens",
    "buffer": "completions in the buffer",
    "sampler_mismatch": "sampler mismatch, nats per token",
}
LOGARITHMIC = {"fresh_log_w_variance", "log_w_variance", "loss", "gap"}


def curves(runs: Sequence[RunRecord]) -> list[str]:
    """The figures of the log against the update: a chart for each, with a line for each run."""
    found: list[str] = []
    for name, title in CURVES.items():
        lines = [_curve(run, name) for run in runs]
        if not any(len(steps) > 1 for steps, _ in lines):
            continue
        fig, ax = _panel(title)
        for i, ((steps, values), run) in enumerate(zip(lines, runs, strict=True)):
            ax.plot(steps, values, color=_colour(i), linewidth=1.6, label=run.name)
        if name in LOGARITHMIC and all(v > 0 for _, values in lines for v in values):
            ax.set_yscale("log")
        if len(runs) > 1 and not found:
            ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
        found.append(svg(fig, title))
    return found


def _curve(run: RunRecord, name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in run.history if _finite(entry.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def weights(run: RunRecord) -> list[str]:
    """For each prompt, histograms of the log weights of its draws before and after training, minus log Z: an exact
    sampler has all of them at zero. log Z is exact if it is known, else the estimate from the draws after training."""
    before = {str(look["row"]): look["log_weights"] for look in run.before}
    known = [row.get("exact_log_z") for row in run.diagnosis] or [None] * len(run.after)
    found: list[str] = []
    for i, (last, log_z) in enumerate(zip(run.after, known, strict=False)):
        centre = next((z for z in (log_z, last["log_z"]) if z is not None), 0.0)
        pair = before.get(str(last["row"]), []), last["log_weights"]
        old, new = ([w - centre for w in log_weights if w is not None] for log_weights in pair)
        low, high = min([*old, *new, -1.0]), max([*old, *new, 1.0])
        edges = [low + (high - low) * k / BINS for k in range(BINS + 1)]
        fig, ax = _panel(f"prompt {i + 1}")
        ax.hist(old, edges, color=BEFORE, alpha=0.55, label="before")
        ax.hist(new, edges, color=SERIES_COLOURS[0], alpha=0.65, label="after")
        ax.axvline(0, color=INK, linewidth=1.2, linestyle="--")
        ax.set_xlabel("log weight - log Z, nats")
        if not found:
            ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
        found.append(svg(fig, f"{run.name}, prompt {i + 1}: log weights before and after training"))
    return found


def _panel(title: str) -> tuple[Figure, Axes]:
    fig = new_figure(*SIZE)
    fig.set_layout_engine("none")  # which would draw each chart twice
    ax = fig.add_axes((0.16, 0.2, 0.82, 0.62))
    ax.set_title(title, loc="left", fontsize=SMALL, color=INK)
    style(ax)
    return fig, ax


def log_z_bounds(run: RunRecord) -> str:
    """log Z of each diagnosed prompt from both sides: ELBO, interval, and the exact value where it is known."""
    rows = run.diagnosis
    if not rows:
        return ""
    fig, (ax,) = panels(1, 1, (5.4, 0.9 + 0.42 * len(rows)))
    for i, row in enumerate(rows):
        low, high = row["log_z_low"], row["log_z_high"]
        if low is not None and high is not None:
            ax.plot(
                [low, high], [i, i], color=SERIES_COLOURS[0], linewidth=6, solid_capstyle="butt", alpha=0.5
            )
        elif low is not None:
            ax.plot([low], [i], marker=">", color=SERIES_COLOURS[0], markersize=9, linestyle="")
        if row["elbo"] is not None:
            ax.plot(
                [row["elbo"]], [i], marker="|", color=BEFORE, markersize=14, markeredgewidth=2, linestyle=""
            )
        if row.get("exact_log_z") is not None:
            ax.plot([row["exact_log_z"]], [i], marker="D", color=INK, markersize=5, linestyle="")
    ax.set_yticks(range(len(rows)), [f"prompt {i + 1}" for i in range(len(rows))])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("nats")
    style(ax)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    return svg(fig, f"log Z from both sides, {run.name}")


def svg(fig: Figure, label: str) -> str:
    """The figure as an <svg> element for a page; the same data give the same text. label: read out in its place."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # several charts share a page; nothing refers to these
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' height="[\d.]+pt"| width="([\d.]+)pt"', _limited, text, count=2)
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, variable, text, flags=re.IGNORECASE)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _limited(size: re.Match[str]) -> str:
    """A chart is as wide as its column, but not wider than it was drawn."""
    return f' style="max-width: {size[1]}pt"' if size[1] else ""


def _colour(i: int) -> str:
    return SERIES_COLOURS[i % len(SERIES_COLOURS)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
