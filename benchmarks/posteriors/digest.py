"""What tables and figures say of the curves of finished runs, which themselves stay with their runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from amortlm.lab.experiment import Run

from .methods import CONVERGED, MAIN, MARK, TRAINED, Point

Runs = dict[tuple[str, str], list[dict[str, list[Point]]]]  # (target, method) -> the curves of its seeds
Digest = dict[str, Any]

LEVELS = (0.1, MARK, 0.02)
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
    *((f"{MAIN} + {c.upper()}", MAIN, c) for c in ("sir", "mh", "smc")),
    *((f"{name} + SIR", name, "sir") for name in ("forward-kl", "sft")),
]
# Lines of the figure: label, method, curve.
LINES: list[tuple[str, str, str]] = [
    ("rejection", "rejection", "rejection"),
    ("SIR, prompted", "sir", "sir"),
    ("MH, prompted", "mh", "mh"),
    ("SMC, prompted", "smc", "smc"),
    ("GFlowNet + SIR", MAIN, "sir"),
    ("GFlowNet + SMC", MAIN, "smc"),
]


def digest(found: Mapping[str, list[Run]]) -> Digest:
    """By target.

    facts   what kind of target it is
    rows    key -> label of a row -> target -> the figure at these passes, over seeds (None: infinite)
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
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for key in KEYS:
        for row in ROWS:
            by_target = {t: v for t in facts if (v := values(runs, t, row, key))}
            if by_target:
                rows[key][row[0]] = by_target
    return {
        "facts": facts,
        "rows": rows,
        "passes": {str(level): {t: passes_of(runs, t, level) for t in facts} for level in LEVELS},
        "upper": {t: passes_of(runs, t, MARK, favoured=False) for t in facts},
        "lines": {t: lines_of(runs, t) for t in facts},
    }


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
    """Rounded: for the eye."""
    return {
        label: [_columns(curves[curve]) for curves in runs[target, method]]
        for label, method, curve in LINES
        if (target, method) in runs
    }


def _columns(curve: Sequence[Point]) -> dict[str, list[float]]:
    known = [key for key in ("passes", "tv", "tv_low") if key in curve[0]]
    return {key: [float(f"{p[key]:.4g}") for p in curve] for key in known}


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
