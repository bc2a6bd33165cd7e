"""Finished runs, and what the tables and figures read from their curves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from .methods import CONVERGED, MAIN, MARK, TRAINED, Point

Runs = dict[tuple[str, str], list[dict[str, Any]]]  # (target, method) -> its seeds

LEVELS = (0.1, MARK, 0.02)
MISSING, INFINITE = "–", "∞"
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


def read_runs(folder: Path) -> Runs:
    out: Runs = defaultdict(list)
    for file in sorted((folder / "runs").glob("*.json")):
        run = json.loads(file.read_text())
        out[run["target"], run["method"]].append(run)
    return out


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


def values(runs: Runs, target: str, row: tuple[str, str, str, int], key: str) -> list[float]:
    """A figure of a table row over seeds; empty where there is none."""
    _, method, curve, passes = row
    found = [at(run["curves"][curve], passes, key) for run in runs.get((target, method), [])]
    return [v for v in found if v is not None]


def passes_to(runs: Runs, target: str, method: str, curve: str, level: float) -> float | None:
    """Mean over seeds; None where a seed never gets there. For SMC from the prompted model: the lower bound of its TV,
    which favours it."""
    key = "tv_low" if (method, curve) == ("smc", "smc") else "tv"
    found = [reach(run["curves"][curve], level, key) for run in runs.get((target, method), [])]
    return None if not found or None in found else mean(v for v in found if v is not None)
