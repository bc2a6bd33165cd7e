"""Does a sampler pass a test of goodness of fit? Pass rates of repeated experiments, as benchmarks of random numbers
count them.

p [K] are the stated probabilities, q [K] those of the sampler, which are known exactly: so the draws of an experiment
are multinomial counts of the K outcomes and of one more, anything else (probability 1 - sum q).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from amortlm.errors import DataError

LEVEL = 0.05  # of the tests
SIMULATED = 2000  # experiments with draws of p itself
SMALLEST = 5.0  # expected draws in a cell of the chi-square test
Array = NDArray[np.float64]


def experiments(q: Array, draws: int, repeats: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[repeats, K + 1] counts; the last column counts the answers that are no outcome. Raises DataError."""
    if q.ndim != 1 or not len(q) or (q < 0).any() or q.sum() > 1 + 1e-4:
        raise DataError("q must be the probabilities of at least one outcome, which sum to at most 1")
    whole = np.append(q, max(0.0, 1.0 - q.sum()))
    return rng.multinomial(draws, whole / whole.sum(), size=repeats)


def ks_pass_rate(p: Array, q: Array, draws: int, repeats: int, rng: np.random.Generator) -> float:
    """Share of experiments of `draws` draws that a Kolmogorov-Smirnov test at 5 % does not reject. Outcomes are
    numbers, ascending; answers that are no outcome stand above them all.

    The p-value compares the largest distance of distribution functions with that of simulated draws of p. The p-value
    for continuous distributions is too large where outcomes repeat (for a die, nearly every perfect sampler would
    pass); with this one a perfect sampler passes 95 % of the experiments, or a little more where few outcomes give
    equal distances. Raises DataError.
    """
    null = ks_distance(experiments(p / p.sum(), draws, SIMULATED, rng), p)
    found = ks_distance(experiments(q, draws, repeats, rng), p)
    at_least = (null[None, :] >= found[:, None] - 1e-9).sum(1)
    return float(((1 + at_least) / (1 + SIMULATED) > LEVEL).mean())


def ks_distance(counts: NDArray[np.int64], p: Array) -> Array:
    """[R] the largest distance between the distribution functions of counts [R, K + 1] and of p [K]."""
    share = counts.cumsum(1)[:, :-1] / counts.sum(1, keepdims=True)
    return np.abs(share - p.cumsum()).max(1)


def chi_square_pass_rate(p: Array, q: Array, draws: int, repeats: int, rng: np.random.Generator) -> float:
    """Share of experiments of `draws` draws that Pearson's chi-square test at 5 % does not reject. One answer that is
    no outcome rejects, since none is expected. Raises DataError."""
    return float((chi_square_p(experiments(q, draws, repeats, rng), p) > LEVEL).mean())


def chi_square_p(counts: NDArray[np.int64], p: Array) -> Array:
    """[R] p-values of counts [R, K + 1]. Neighbouring outcomes share a cell until it expects SMALLEST draws."""
    draws = counts.sum(1)[0]
    starts, filled = [0], 0.0
    for k, expected in enumerate(p * draws):
        if filled >= SMALLEST:
            starts, filled = [*starts, k], 0.0
        filled += expected
    if filled < SMALLEST and len(starts) > 1:
        starts.pop()  # the last cell joins the one before
    observed, expected = np.add.reduceat(counts[:, :-1], starts, axis=1), np.add.reduceat(p * draws, starts)
    statistic = torch.from_numpy(((observed - expected) ** 2 / expected).sum(1))
    freedom = torch.full_like(statistic, len(starts) - 1)
    value = (
        torch.special.gammaincc(freedom / 2, statistic / 2).numpy()
        if len(starts) > 1
        else np.ones(len(counts))
    )
    return np.where(counts[:, -1] > 0, 0.0, value)
