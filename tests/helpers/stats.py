"""Tests of randomness share one false-alarm rate: a correct library fails the suite once in a million runs.

Seeds are fixed, so in practice a pass stays a pass; the rate says how surprising a failure is after a change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FALSE_ALARM = 1e-6  # of the whole suite
TESTS = 80  # tests that may share it; raise it before adding an 81st
LEVEL = FALSE_ALARM / TESTS


def g_test(counts: Tensor, probs: Tensor, smallest: float = 5.0) -> float:
    """p-value of the hypothesis that `counts` were drawn from `probs`, by the likelihood-ratio (G) test.

    Cells that expect fewer than `smallest` draws are pooled.
    """
    counts, expected = counts.double(), probs.double() / probs.double().sum() * counts.sum()
    small = expected < smallest
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    g = 2 * torch.special.xlogy(counts, counts / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, g / 2).item()


def binomial_tail(misses: int, n: int, rate: float) -> float:
    """Probability of at least so many misses at that rate."""
    terms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(rate) + (n - k) * math.log1p(-rate)
        for k in range(misses, n + 1)
    ]  # fmt: skip
    return math.fsum(math.exp(t) for t in terms)
