"""Likelihood against diversity, as in figure 3 of Hu et al. 2024, and which points dominate which."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.lab.experiment import Results
from amortlm.lab.store import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GFLOWNET = "gflownet"
Point = dict[str, Any]
MARKERS = "osD^vP*X"


def held_out_points(results: Results) -> list[Point]:
    """Held-out points of every method, means over seeds: method, setting, compute, max_ll, diversity."""
    groups: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for method, runs in results["runs"].items():
        for run in runs:
            for point in run["details"]["points"]:
                if point["split"] == "test":
                    groups[method, label(point["setting"]), point["compute"]].append(point)
    return [
        {"method": method, "setting": setting, "compute": compute}
        | {name: _mean([p[name] for p in points]) for name in ("max_ll", "mean_ll", "diversity")}
        for (method, setting, compute), points in groups.items()
    ]


def label(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in setting.items())


def _mean(values: list[float | None]) -> float:
    known = [math.nan if v is None else v for v in values]
    return math.fsum(known) / len(known)


def dominates(a: Point, b: Point) -> bool:
    """a is at least as likely and as diverse as b, and better in one. A point without a diversity dominates none."""
    at_least = a["max_ll"] >= b["max_ll"] and a["diversity"] >= b["diversity"]
    return at_least and (a["max_ll"] > b["max_ll"] or a["diversity"] > b["diversity"])


def standing(results: Results) -> dict[str, Any]:
    """For each GFlowNet: the decoder points that dominate it and those it dominates, at its own compute ("same")
    and at up to `compute` times as much ("more"); and how much more diverse it is than the decoders at least as
    likely (None: there are none)."""
    points = held_out_points(results)
    decoders, gflownets = by_kind(points)
    limits = {"same": 1, "more": results["settings"]["compute"]}
    return {
        ours["method"]: {
            name: _compare(ours, [p for p in decoders if p["compute"] <= limit])
            for name, limit in limits.items()
        }
        for ours in gflownets
    }


def by_kind(points: list[Point]) -> tuple[list[Point], list[Point]]:
    """Those of decoders, and those of GFlowNets."""
    ours = [p for p in points if p["method"].startswith(GFLOWNET)]
    return [p for p in points if p not in ours], ours


def summary(results: Results) -> str:
    """One line per GFlowNet: which decoders are both likelier and more diverse (means over seeds, held-out prompts)."""
    lines = []
    for method, found in standing(results).items():
        same, more = (", ".join(found[k]["dominated_by"]) or "no decoder" for k in ("same", "more"))
        beaten = ", ".join(found["same"]["dominates"]) or "none"
        lines.append(f"- {method}: dominated by {same}; with more compute: {more}. It dominates: {beaten}.")
    return "\n".join(["Dominated: another is as likely and as diverse, and better in one.", "", *lines])


def _compare(ours: Point, decoders: list[Point]) -> dict[str, Any]:
    likely = [p["diversity"] for p in decoders if p["max_ll"] >= ours["max_ll"]]
    rivals = [d for d in likely if not math.isnan(d)]
    by = [name_of(p) for p in decoders if dominates(p, ours)]
    return {
        "dominated": bool(by),
        "dominated_by": by,
        "dominates": [name_of(p) for p in decoders if dominates(ours, p)],
        "diversity_margin": ours["diversity"] - max(rivals) if rivals else None,
    }


def name_of(point: Point) -> str:
    setting = f" {point['setting']}" if point["setting"] else ""
    return f"{point['method']}{setting} ({point['compute']}x)"


def figures(results: Results, folder: Path) -> list[str]:
    """Draw frontier.png, and write `standing` to standing.json."""
    from amortlm.plots import INK, SMALL, TEXT, TITLE, new_figure, save, style

    points = [p for p in held_out_points(results) if math.isfinite(p["diversity"])]
    found = standing(results)
    write_json(folder / "standing.json", found)
    fig = new_figure(7.2, 4.8)
    ax = fig.subplots()
    decoders, gflownets = by_kind(points)
    _scatter_decoders(ax, decoders)
    _line_of_gflownets(ax, gflownets)
    ax.set_title(headline(found), loc="left", fontsize=TITLE, color=INK)
    ax.set_xlabel("max log p(z | x), nats, mean over held-out prompts", fontsize=TEXT)
    ax.set_ylabel("diversity, 1 - mean pairwise cosine", fontsize=TEXT)
    style(ax)
    ax.legend(frameon=False, fontsize=SMALL - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    return save(fig, folder / "frontier.png")


def _scatter_decoders(ax: Axes, points: list[Point]) -> None:
    """A colour and a marker for each method; hollow at more compute."""
    from amortlm.plots import SERIES_COLOURS

    colours = [*SERIES_COLOURS[1:], "#E69F00", "#56B4E9", "#7F7F7F"]
    for i, family in enumerate(dict.fromkeys(p["method"] for p in points)):
        colour = colours[i % len(colours)]
        mine = [p for p in points if p["method"] == family]
        for compute in sorted({p["compute"] for p in mine}):
            some = [p for p in mine if p["compute"] == compute]
            ax.scatter(
                [p["max_ll"] for p in some],
                [p["diversity"] for p in some],
                marker=MARKERS[i % len(MARKERS)],
                s=42,
                edgecolors=colour,
                facecolors=colour if compute == 1 else "none",
                label=f"{family}{'' if compute == 1 else f', {compute}x compute'}",
                alpha=0.9,
            )


def _line_of_gflownets(ax: Axes, points: list[Point]) -> None:
    from amortlm.plots import AFTER, SMALL

    if not points:
        return
    x, y = [p["max_ll"] for p in points], [p["diversity"] for p in points]
    ax.plot(x, y, color=AFTER, marker="o", markersize=8, linewidth=1.8, label="GFlowNet", zorder=5)
    for p in points:
        name, at = p["method"].removeprefix(f"{GFLOWNET}-"), (p["max_ll"], p["diversity"])
        ax.annotate(name, at, (5, 6), textcoords="offset points", fontsize=SMALL, color=AFTER)


def headline(found: dict[str, Any]) -> str:
    """How many of the GFlowNet's points no decoder dominates."""
    if not found:
        return "decoders"
    same, more = (sum(not f[name]["dominated"] for f in found.values()) for name in ("same", "more"))
    return (
        f"GFlowNet points that no decoder dominates: {same} of {len(found)} at equal compute, {more} at more"
    )
