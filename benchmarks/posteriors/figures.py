"""Pictures of the finished runs: TV against passes, a panel for each target, and the TV of every method."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from .methods import MAIN
from .report_data import MARK, MISSING, ROWS, Runs, values

LINES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rejection", "rejection", "rejection", {"color": "#999999", "ls": ":"}),
    ("SIR, prompted", "sir", "sir", {"color": "#E69F00", "ls": "--"}),
    ("MH, prompted", "mh", "mh", {"color": "#CC79A7", "ls": "--"}),
    ("SMC, prompted", "smc", "smc", {"color": "#D55E00"}),
    ("GFlowNet + SIR", MAIN, "sir", {"color": "#0072B2", "lw": 2.2}),
    ("GFlowNet + SMC", MAIN, "smc", {"color": "#009E73"}),
]


def curves_figure(runs: Runs, targets: list[str], file: Path) -> None:
    """One panel per target: TV of one output against its passes."""
    from matplotlib.figure import Figure

    columns = min(4, len(targets))
    rows = -(-len(targets) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(targets) :]:
        ax.set_visible(False)
    handles: dict[str, Any] = {}
    for ax, target in zip(axes.flat, targets, strict=False):
        for label, method, curve, style in LINES:
            for run in runs.get((target, method), []):
                found = run["curves"][curve]
                if "tv_low" in found[0]:
                    band = [max(p["tv_low"], 1e-4) for p in found], [max(p["tv"], 1e-4) for p in found]
                    ax.fill_between(
                        [p["passes"] for p in found], *band, color=style["color"], alpha=0.2, lw=0
                    )
                (handles[label],) = ax.plot(
                    [p["passes"] for p in found], [max(p["tv"], 1e-4) for p in found], **{"lw": 1.4} | style
                )
        handles["TV = 0.05"] = ax.axhline(MARK, color="#222222", lw=0.8, ls=(0, (1, 2)))
        ax.set(xscale="log", yscale="log", ylim=(2e-3, 1.3), xlim=(0.9, 8e4))
        ax.set_title(target, fontsize=11)
        ax.grid(color="#E3E3E3", lw=0.6)
    figure.supxlabel("passes for one output (completions drawn and judged)")
    figure.supylabel("total variation to the posterior")
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False
    )
    figure.savefig(file, dpi=110)


def table_figure(runs: Runs, targets: list[str], file: Path) -> None:
    """The TV table as a heat map."""
    from matplotlib.figure import Figure

    rows = [row for row in ROWS if any(values(runs, t, row, "tv") for t in targets)]
    grid = np.array([[mean(values(runs, t, row, "tv") or [math.nan]) for t in targets] for row in rows])
    figure = Figure(figsize=(2.6 + 0.78 * len(targets), 1.2 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(np.log10(np.maximum(grid, 1e-3)), cmap="viridis_r", vmin=-2.5, vmax=0, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        dark = value > 0.05
        text = MISSING if math.isnan(value) else f"{value:.3f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    ax.set_xticks(range(len(targets)), targets, rotation=35, ha="right")
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_title("total variation of one output to the exact posterior", fontsize=11)
    figure.savefig(file, dpi=110)
