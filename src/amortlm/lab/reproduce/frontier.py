"""Likelihood against diversity (the form of figure 3 of Hu et al. 2024), and who dominates whom."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from amortlm.lab.reproduce.storage import write_json

GFLOWNET = "gflownet"
Point = dict[str, Any]
MARKERS = "osD^vP*X"


def held_out_points(results: dict[str, Any]) -> list[Point]:
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


def standing(results: dict[str, Any]) -> dict[str, Any]:
    """For each GFlowNet: the decoder points that dominate it and those it dominates, at its own compute ("same")
    and at up to `compute` times as much ("more"); and how much more diverse it is than the decoders at least as
    likely (None: there are none)."""
    points = held_out_points(results)
    decoders = [p for p in points if not p["method"].startswith(GFLOWNET)]
    out = {}
    for ours in points:
        if not ours["method"].startswith(GFLOWNET):
            continue
        out[ours["method"]] = {
            name: _compare(ours, [p for p in decoders if p["compute"] <= limit])
            for name, limit in (("same", 1), ("more", results["settings"]["compute"]))
        }
    return out


def summary(results: dict[str, Any]) -> str:
    """One line per GFlowNet: which decoders are both likelier and more diverse (means over seeds, held-out prompts)."""
    lines = []
    for method, found in standing(results).items():
        same, more = (", ".join(found[k]["dominated_by"]) or "no decoder" for k in ("same", "more"))
        beaten = ", ".join(found["same"]["dominates"]) or "none"
        lines.append(f"- {method}: dominated by {same}; with more compute: {more}. It dominates: {beaten}.")
    return "\n".join(["Dominated: another is as likely and as diverse, and better in one.", "", *lines])


def _compare(ours: Point, decoders: list[Point]) -> dict[str, Any]:
    rivals = [
        p["diversity"] for p in decoders if p["max_ll"] >= ours["max_ll"] and p["diversity"] > -math.inf
    ]
    return {
        "dominated": any(dominates(p, ours) for p in decoders),
        "dominated_by": [name_of(p) for p in decoders if dominates(p, ours)],
        "dominates": [name_of(p) for p in decoders if dominates(ours, p)],
        "diversity_margin": ours["diversity"] - max(rivals) if rivals else None,
    }


def name_of(point: Point) -> str:
    setting = f" {point['setting']}" if point["setting"] else ""
    return f"{point['method']}{setting} ({point['compute']}x)"


def figures(results: dict[str, Any], folder: Path) -> list[str]:
    """The scatter, and `standing` as standing.json."""
    from matplotlib.figure import Figure

    from amortlm.lab.plots import AFTER, DPI, INK, SERIES_COLOURS, SMALL, TEXT, TITLE, style

    points = [p for p in held_out_points(results) if math.isfinite(p["diversity"])]
    found = standing(results)
    write_json(folder / "standing.json", found)
    fig = Figure(figsize=(7.2, 4.8), dpi=DPI, layout="constrained", facecolor="white")
    ax = fig.subplots()
    families = list(dict.fromkeys(p["method"] for p in points if not p["method"].startswith(GFLOWNET)))
    colours = [*SERIES_COLOURS[1:], "#E69F00", "#56B4E9", "#7F7F7F"]
    for i, family in enumerate(families):
        mine = [p for p in points if p["method"] == family]
        for compute in sorted({p["compute"] for p in mine}):
            some = [p for p in mine if p["compute"] == compute]
            ax.scatter(
                [p["max_ll"] for p in some],
                [p["diversity"] for p in some],
                marker=MARKERS[i % len(MARKERS)],
                s=42,
                edgecolors=colours[i % len(colours)],
                facecolors=colours[i % len(colours)] if compute == 1 else "none",
                label=f"{family}{'' if compute == 1 else f', {compute}x compute'}",
                alpha=0.9,
            )
    ours = [p for p in points if p["method"].startswith(GFLOWNET)]
    if ours:
        x, y = [p["max_ll"] for p in ours], [p["diversity"] for p in ours]
        ax.plot(x, y, color=AFTER, marker="o", markersize=8, linewidth=1.8, label="GFlowNet", zorder=5)
        for p in ours:
            text = p["method"].removeprefix(f"{GFLOWNET}-")
            ax.annotate(
                text,
                (p["max_ll"], p["diversity"]),
                (5, 6),
                textcoords="offset points",
                fontsize=SMALL,
                color=AFTER,
            )
    ax.set_title(headline(found), loc="left", fontsize=TITLE, color=INK)
    ax.set_xlabel("max log p(z | x), nats, mean over held-out prompts", fontsize=TEXT)
    ax.set_ylabel("diversity, 1 - mean pairwise cosine", fontsize=TEXT)
    style(ax)
    ax.legend(frameon=False, fontsize=SMALL - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    fig.savefig(folder / "frontier.png", format="png", metadata={"Software": None})
    return ["frontier.png"]


def headline(found: dict[str, Any]) -> str:
    """How many of the GFlowNet's points no decoder dominates."""
    if not found:
        return "decoders"
    free = [sum(not f[name]["dominated"] for f in found.values()) for name in ("same", "more")]
    return (
        f"GFlowNet points that no decoder dominates: {free[0]} of {len(found)} at equal compute, "
        f"{free[1]} at more"
    )
