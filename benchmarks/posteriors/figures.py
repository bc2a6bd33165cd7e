"""Pictures of the finished runs: TV against passes, a panel for each target, and the TV of every method."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from amortlm.lab.experiment import Results
from amortlm.lab.report import MISSING
from amortlm.plots import panels, save

from .digest import MARK, PASSES_SHOWN, TV_FLOOR, TV_SHOWN, Digest

STYLES: dict[str, dict[str, Any]] = {
    "rejection": {"color": "#999999", "ls": ":"},
    "SIR, prompted": {"color": "#E69F00", "ls": "--"},
    "MH, prompted": {"color": "#CC79A7", "ls": "--"},
    "SMC, prompted": {"color": "#D55E00"},
    "SIR, guided": {"color": "#56B4E9"},
    "GFlowNet + SIR": {"color": "#0072B2", "lw": 2.2},
    "GFlowNet + SMC": {"color": "#009E73"},
}


def figures(results: Results, folder: Path) -> list[str]:
    found = results["digest"]
    return [*curves_figure(found, folder / "passes.png"), *table_figure(found, folder / "tv.png")]


def curves_figure(found: Digest, file: Path) -> list[str]:
    """One panel per target: TV of one output against its passes."""
    targets = list(found["facts"])
    figure, axes = panels(len(targets), 4, (3.4, 2.7), sharex=True, sharey=True)
    in_a_row = 2 * min(len(targets), 4)  # labels of the legend
    room = 0.3 + 0.3 * -(-(len(STYLES) + 1) // in_a_row)
    figure.set_size_inches(max(5.5, figure.get_figwidth()), figure.get_figheight() + room)
    handles: dict[str, Any] = {}
    for ax, target in zip(axes, targets, strict=True):
        for label, seeds in found["lines"][target].items():
            for line in seeds:
                tv = np.maximum(line["tv"], TV_FLOOR)
                if "tv_low" in line:
                    low, colour = np.maximum(line["tv_low"], TV_FLOOR), STYLES[label]["color"]
                    ax.fill_between(line["passes"], low, tv, color=colour, alpha=0.2, lw=0)
                (handles[label],) = ax.plot(line["passes"], tv, **{"lw": 1.4} | STYLES[label])
        handles[f"TV = {MARK}"] = ax.axhline(MARK, color="#222222", lw=0.8, ls=(0, (1, 2)))
        ax.set(xscale="log", yscale="log", ylim=TV_SHOWN, xlim=PASSES_SHOWN)
        ax.set_title(target, fontsize=11)
        ax.grid(color="#E3E3E3", lw=0.6)
    figure.supxlabel("passes for one output (completions drawn and judged)")
    figure.supylabel("total variation to the posterior")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=in_a_row, frameon=False)
    return save(figure, file)


def table_figure(found: Digest, file: Path) -> list[str]:
    """The TV table as a heat map."""
    targets, rows = list(found["facts"]), found["rows"]["tv"]
    grid = np.array([[mean(of or [math.nan]) for of in cells] for cells in rows.values()])
    figure, (ax,) = panels(1, 1, (2.6 + 0.78 * len(targets), 1.2 + 0.3 * len(rows)))
    ax.imshow(np.log10(np.maximum(grid, 1e-3)), cmap="viridis_r", vmin=-2.5, vmax=0, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        text = MISSING if math.isnan(value) else f"{value:.3f}"
        colour = "white" if value > 0.05 else "#222222"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(len(targets)), targets, rotation=35, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    figure.suptitle("total variation of one output", fontsize=11)
    return save(figure, file)
