"""Calibration: is a prediction of confidence 0.8 right in 80 % of cases?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amortlm.errors import DataError


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence in (low, high], 0 included in the first. Means are nan in an empty bin."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """accuracy, mean confidence, expected calibration error, and the bins of the reliability diagram."""

    accuracy: float
    confidence: float
    ece: float
    bins: list[Bin]


def calibration(confidences: Sequence[float], correct: Sequence[bool], num_bins: int = 10) -> Calibration:
    """Calibration of predictions from their confidence in [0, 1] and whether they were correct.

    ECE (Naeini et al. 2015): |accuracy - confidence| of equal-width bins, averaged with their share of predictions.
    Raises DataError.
    """
    p, right = np.asarray(confidences, float), np.asarray(correct, float)
    if p.shape != right.shape or p.ndim != 1 or not len(p):
        raise DataError(f"{p.size} confidences and {right.size} outcomes: give one for one, at least one")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(right, (0, 1)).all():
        raise DataError("confidences must lie in [0, 1], and outcomes must be true or false")
    if num_bins < 1:
        raise DataError(f"num_bins must be at least 1, not {num_bins}")
    edges = np.linspace(0, 1, num_bins + 1)
    number = np.searchsorted(edges[1:-1], p, side="left")
    bins = []
    for i in range(num_bins):
        mine = number == i
        means = (p[mine].mean(), right[mine].mean()) if mine.any() else (np.nan, np.nan)
        bins.append(Bin(edges[i].item(), edges[i + 1].item(), int(mine.sum()), *map(float, means)))
    ece = sum(b.count * abs(b.accuracy - b.confidence) for b in bins if b.count) / len(p)
    return Calibration(float(right.mean()), float(p.mean()), ece, bins)
