"""Is one method better than another on the same examples?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amortlm.errors import DataError

CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class PairedTest:
    """difference: mean of a - b over the n examples; low, high: its 95 % bootstrap percentile interval;
    p_value: two-sided, of the hypothesis that the sign of each difference is random."""

    n: int
    difference: float
    low: float
    high: float
    p_value: float


def paired_test(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compare the values a and b of the same examples, by resampling their differences.

    The p-value counts the observed signs as one of the flips, so it is at least 1 / (resamples + 1). Intervals from
    fewer than about 20 examples are too narrow. Raises DataError for lists of different lengths, empty or not finite.
    """
    d = np.asarray(a, float) - np.asarray(b, float) if len(a) == len(b) else np.empty(0)
    if not len(d) or not np.isfinite(d).all():
        raise DataError(
            f"{len(a)} and {len(b)} values: give finite values of the same examples, at least one each"
        )
    rng = np.random.default_rng(seed)
    n, observed = len(d), d.mean()
    boot, flips = [], []
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), n)
        boot.append(d[rng.integers(n, size=shape)].mean(1))
        flips.append((d * rng.choice((-1.0, 1.0), size=shape)).mean(1))
    low, high = np.quantile(np.concatenate(boot), (0.025, 0.975))
    # Flips that give the observed mean exactly must count, whatever the rounding.
    extreme = np.abs(np.concatenate(flips)) >= abs(observed) - 1e-12 * max(1.0, np.abs(d).max())
    return PairedTest(
        n, float(observed), float(low), float(high), float((1 + extreme.sum()) / (1 + resamples))
    )
