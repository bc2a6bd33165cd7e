"""What tables and figures need of the curves of finished runs. The curves themselves stay in the files of the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from amortlm.lab.experiment import Run

from .methods import CONVERGED, MAIN, MARK, TRAINED, Point

Runs = dict[tuple[str, str], list[dict[str, list[Point]]]]  # (target, method) -> the curves of its seeds
Digest = dict[str, Any]

LEVELS = (0.1, MARK, 0.02)
DIGITS, DRAWN_DIGITS = 7, 4  # significant ones, of what tables show and of what the figure draws
# What the figure of lines shows: its axes, both logarithmic, where a pixel is a hundredth of a decade.
PASSES_SHOWN, TV_SHOWN, TV_FLOOR = (0.9, 8e4), (2e-3, 1.3), 1e-4
PIXEL = 0.01
KEYS = ("tv", "kl_qp", "kl_pq", "modes")
# Rows of the tables: label, method, curve, passes of one output.
ROWS: list[tuple[str, str, str, int]] = [
    ("prompted model", "prompted", "q", 1),
    *((f"rejection, {n} passes", "rejection", "rejection", n) for n in (16, 256)),
    *((f"best of {n}", "best-of-n", "best-of-n", n) for n in (16, 256)),
    *((f"SIR, {n} passes", "sir", "sir", n) for n in (16, 256)),
    *((f"MH, {n} passes", "mh", "mh", n) for n in (16, 256, 4096)),
    *((f"SMC, {n} passes", "smc", "smc", n) for n in (16, 256, 4096)),
    *((name, name, "q", 1) for name in TRAINED),
    *((f"{MAIN} + SIR, {n} passes", MAIN, "sir", n) for n in (4, 16, 256)),
    *((f"{MAIN} + {c.upper()}, 16 passes", MAIN, c, 16) for c in ("mh", "smc")),
]
# Columns of the table of passes: label, method, curve.
COLUMNS: list[tuple[str, str, str]] = [
    *((label, label.lower(), label.lower()) for label in ("rejection", "SIR", "MH", "SMC")),
    ("guided + SIR", "guided", "sir"),
    *((f"{MAIN} + {c.upper()}", MAIN, c) for c in ("sir", "mh", "smc")),
    *((f"{name} + SIR", name, "sir") for name in ("forward-kl", "sft")),
]
# Lines of the figure: label, method, curve.
LINES: list[tuple[str, str, str]] = [
    ("rejection", "rejection", "rejection"),
    ("SIR, prompted", "sir", "sir"),
    ("MH, prompted", "mh", "mh"),
    ("SMC, prompted", "smc", "smc"),
    ("SIR, guided", "guided", "sir"),
    ("GFlowNet + SIR", MAIN, "sir"),
    ("GFlowNet + SMC", MAIN, "smc"),
]


def digest(found: Mapping[str, list[Run]]) -> Digest:
    """JSON, rounded.

    facts   target -> what kind of target it is
    rows    key -> label of a row -> for each target the figure at these passes over seeds (None: infinite), an empty
            list where there is none
    passes  level -> target -> label of a column -> passes to this TV (None: never reached)
    upper   target -> label of a column -> passes to MARK by the upper bound of a simulated distance
    lines   target -> label of a line -> its seeds: passes, tv, and tv_low where it is simulated
    """
    runs: Runs = {}
    facts: dict[str, dict[str, float]] = {}
    for name, of in found.items():
        target, method = name.split(" ", 1)
        runs[target, method] = [run["records"]["curves"] for run in of]
        facts.setdefault(target, of[0]["records"]["facts"])
    rows: dict[str, dict[str, Any]] = {key: {} for key in KEYS}
    for key in KEYS:
        for row in ROWS:
            cells = [values(runs, t, row, key) for t in facts]
            if any(cells):
                rows[key][row[0]] = cells
    return rounded(
        {
            "facts": facts,
            "rows": rows,
            "passes": {str(level): {t: passes_of(runs, t, level) for t in facts} for level in LEVELS},
            "upper": {t: passes_of(runs, t, MARK, favoured=False) for t in facts},
            "lines": {t: lines_of(runs, t) for t in facts},
        }
    )


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """JSON with its numbers rounded to so many significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def values(runs: Runs, target: str, row: tuple[str, str, str, int], key: str) -> list[float]:
    """A figure of a table row over seeds; empty where there is none."""
    _, method, curve, passes = row
    found = [at(curves[curve], passes, key) for curves in runs.get((target, method), [])]
    return [v for v in found if v is not None]


def passes_of(runs: Runs, target: str, level: float, favoured: bool = True) -> dict[str, float | None]:
    """Of each column whose method was run: mean over seeds, None where a seed never gets there. favoured: SMC from the
    prompted model is given the lower bound of its TV."""
    out = {}
    for label, method, curve in COLUMNS:
        key = "tv_low" if favoured and (method, curve) == ("smc", "smc") else "tv"
        found = [reach(curves[curve], level, key) for curves in runs.get((target, method), [])]
        if found:
            out[label] = None if None in found else mean(v for v in found if v is not None)
    return out


def lines_of(runs: Runs, target: str) -> dict[str, list[dict[str, list[float]]]]:
    return {
        label: [drawn(curves[curve]) for curves in runs[target, method]]
        for label, method, curve in LINES
        if (target, method) in runs
    }


def drawn(curve: Sequence[Point]) -> dict[str, list[float]]:
    """What the figure needs of a curve: the points that it shows and their neighbours, without those that lie within a
    pixel of the straight line between two others."""
    keys = [key for key in ("passes", "tv", "tv_low") if key in curve[0]]
    points = np.array([[p[key] for key in keys] for p in curve])
    shown = (points[:, 0] <= PASSES_SHOWN[1]) & (points[:, 1:].max(1) >= TV_SHOWN[0])
    points = points[np.convolve(shown, [1, 1, 1])[1:-1] > 0] if shown.any() else points[:1]
    logs = np.log10(np.maximum(points, TV_FLOOR))
    kept = [0]
    for end in range(2, len(points)):
        if not is_straight(logs[kept[-1] : end + 1]):
            kept.append(end - 1)
    kept = sorted({*kept, len(points) - 1})
    return dict(zip(keys, rounded(points[kept].T.tolist(), DRAWN_DIGITS), strict=True))


def is_straight(points: np.ndarray) -> bool:
    """Points [n, x and y's]: is every y within a pixel of the line from the first point to the last?"""
    x, y = points[:, 0], points[:, 1:]
    share = (x - x[0]) / max(x[-1] - x[0], 1e-9)
    return bool((np.abs(y[0] + share[:, None] * (y[-1] - y[0]) - y) < PIXEL).all())


def at(curve: Sequence[Point], passes: float, key: str) -> float | None:
    """A figure at so many passes, log-linear between points; None past the end, or where there is no such figure."""
    known = [(p["passes"], _number(p[key])) for p in curve if key in p]
    converged = known and curve[-1]["tv"] < CONVERGED  # a chain that has arrived stays
    if not known or (passes > known[-1][0] * 1.001 and not converged):
        return None
    if passes < known[0][0]:
        return known[0][1] if passes * 2 >= known[0][0] else None
    x, y = zip(*known, strict=True)
    i = int(np.searchsorted(x, passes, side="right")) - 1
    if i == len(x) - 1 or math.isinf(y[i]) or math.isinf(y[i + 1]):
        return y[i]
    share = math.log(passes / x[i]) / math.log(x[i + 1] / x[i])
    return y[i] + share * (y[i + 1] - y[i])


def reach(curve: Sequence[Point], level: float, key: str = "tv") -> float | None:
    """Passes at which a curve first comes down to a level, log-log between points; None where it never does."""
    before: Point | None = None
    for p in curve:
        value = p.get(key, p["tv"])
        if value <= level:
            if before is None or value <= 0:
                return p["passes"]
            last = before.get(key, before["tv"])
            share = math.log(last / level) / math.log(last / value)
            return before["passes"] * (p["passes"] / before["passes"]) ** share
        before = p
    return None


def _number(value: float | None) -> float:
    return math.inf if value is None else value  # JSON has no infinity
