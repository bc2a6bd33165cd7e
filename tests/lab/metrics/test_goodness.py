"""Pass rates of goodness-of-fit tests: a perfect sampler passes 95 %, a wrong one fails.

Each rate is the mean of 4,000 seeded experiments, whose standard error is .0034 at .95; bounds are five of them away,
with a false-alarm rate below 1e-6 each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from amortlm.errors import DataError
from amortlm.lab.metrics.goodness import (
    chi_square_p,
    chi_square_pass_rate,
    experiments,
    ks_distance,
    ks_pass_rate,
)

REPEATS, OFF = 4000, 5 * 0.0034
BINOMIAL = np.array([math.comb(20, k) / 2**20 for k in range(21)])
DIE = np.full(6, 1 / 6)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("p", [BINOMIAL, DIE, np.full(101, 1 / 101)], ids=["binomial", "die", "uniform"])
def test_a_perfect_sampler_passes_95_percent(p: np.ndarray) -> None:
    """KS: the null distribution is simulated, which adds a standard error of .005; ties add up to .01 to the rate. The
    chi-square distribution is asymptotic, by less than .01."""
    assert 0.95 - 5 * 0.006 < ks_pass_rate(p, p, 100, REPEATS, rng()) < 0.96 + 5 * 0.006
    assert abs(chi_square_pass_rate(p, p, 1000, REPEATS, rng()) - 0.95) < OFF + 0.01


def test_a_wrong_sampler_fails() -> None:
    uniform = np.full(21, 1 / 21)
    assert ks_pass_rate(BINOMIAL, uniform, 100, REPEATS, rng()) < 0.05
    assert chi_square_pass_rate(BINOMIAL, uniform, 1000, REPEATS, rng()) == 0
    assert ks_pass_rate(BINOMIAL, np.roll(BINOMIAL, 2), 100, REPEATS, rng()) < 0.05


def test_answers_that_are_no_outcome() -> None:
    """Chi-square: one in a thousand draws rejects. KS: they stand above all outcomes."""
    q = 0.999 * DIE
    assert chi_square_pass_rate(DIE, q, 1000, REPEATS, rng()) < 0.999**1000 + 5 * 0.008
    assert ks_pass_rate(DIE, 0.7 * DIE, 100, REPEATS, rng()) < 0.01
    assert ks_distance(np.array([[1, 1, 2]]), np.array([0.5, 0.5])).tolist() == [0.5]


def test_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    counts = experiments(DIE, 1000, 5, rng())
    ours = chi_square_p(counts, DIE)
    assert ours == pytest.approx([stats.chisquare(c[:-1]).pvalue for c in counts])


def test_the_p_value_of_continuous_distributions_lets_too_many_pass() -> None:
    """Why `ks_pass_rate` simulates: of perfect dice 99 % would pass."""
    stats = pytest.importorskip("scipy.stats")
    distances = ks_distance(experiments(DIE, 100, REPEATS, rng()), DIE)
    assert (stats.kstwo.sf(distances, 100) > 0.05).mean() > 0.98


def test_cells_expect_enough_draws() -> None:
    """0.1 of 20 draws each: outcomes share cells (5 and 5); with too few for two cells nothing is rejected."""
    p = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    counts = np.array([[20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    statistic = (20 - 6) ** 2 / 6 + 6 + 8  # cells of 3, 3 and 4 outcomes
    assert chi_square_p(counts, p) == pytest.approx([math.exp(-statistic / 2)])  # two degrees of freedom
    assert chi_square_p(counts // 4, p).tolist() == [1.0]


def test_bad_probabilities() -> None:
    for q in ([], [0.5, 0.6], [-0.1, 1.0]):
        with pytest.raises(DataError):
            experiments(np.array(q), 10, 1, rng())
