"""What the figures share: colours, sizes, axes. Matplotlib is imported when a figure is drawn, and never through
pyplot, so there is no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours: they differ for every common colour-vision deficiency, and in grey.
BEFORE, AFTER = "#E69F00", "#0072B2"
SERIES_COLOURS = (AFTER, "#D55E00", "#009E73", "#CC79A7")
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"
DPI = 125  # text of 10 points stays legible when the page shows the picture at half its width
TITLE, TEXT, SMALL = 11.5, 10, 9


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def panels(count: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes of a size in inches, in rows of at most `columns`. shared: sharex, sharey."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig = new_figure(size[0] * columns, size[1] * rows)
    axes = list(fig.subplots(rows, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return fig, axes[:count]


def style(ax: Axes, frame: Sequence[str] = ("left", "bottom")) -> None:
    for side, spine in ax.spines.items():
        spine.set_visible(side in frame)
        spine.set_color(MUTED)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=SMALL, length=3)
    ax.xaxis.label.set(color=INK, fontsize=TEXT)
    ax.yaxis.label.set(color=INK, fontsize=TEXT)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def save(fig: Figure, path: Path) -> list[str]:
    """A PNG; the same data give the same bytes. Returns the file's name, in a list."""
    fig.savefig(path, format="png", metadata={"Software": None})
    return [path.name]
