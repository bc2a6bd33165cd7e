"""Importance diagnostics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.errors import DataError, RewardError
from amortlm.weights import MIN_FOR_KHAT, effective_sample_size, log_mean_exp, pareto_khat, resample


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_weights_by_hand() -> None:
    """w = 1, 2, 3: ESS = 36 / 14, log Z = log 2."""
    log_w = torch.tensor([1.0, 2.0, 3.0]).double().log()
    got = estimate(log_w, torch.tensor([-1.0, -2.0, -6.0]))
    assert got.n == 3
    assert got.ess == pytest.approx(36 / 14 / 3)
    assert got.log_z == pytest.approx(math.log(2))
    mean = math.log(6) / 3
    assert got.elbo == pytest.approx(mean)
    squares = sum((math.log(w) - mean) ** 2 for w in (1, 2, 3))
    assert got.log_w_variance == pytest.approx(squares / 2), "unbiased: divided by n - 1"
    assert got.log_reward == pytest.approx(-3.0)
    assert got.valid == 1.0
    assert math.isnan(got.khat), "no tail to fit"


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_lognormal_weights(sigma: float) -> None:
    """log w ~ N(mu, sigma^2): ESS = exp(-sigma^2), log Z = mu + sigma^2 / 2, ELBO = mu, variance sigma^2.

    Tolerances: at least six standard errors, by the delta method.
    """
    n, mu = 200_000, -700.0
    got = estimate(mu + sigma * normal(n))
    root = math.sqrt(n)
    spread = math.sqrt(math.exp(4 * sigma**2) - 1)  # of the mean of w^2, relative
    assert got.ess == pytest.approx(math.exp(-(sigma**2)), rel=6 * spread / root)
    assert got.log_z == pytest.approx(mu + sigma**2 / 2, abs=6 * math.sqrt(math.expm1(sigma**2)) / root)
    assert got.elbo == pytest.approx(mu, abs=6 * sigma / root)
    assert got.log_w_variance == pytest.approx(sigma**2, rel=6 * math.sqrt(2) / root)
    assert got.elbo < got.log_z


def test_khat_is_the_index_of_a_pareto_tail() -> None:
    """w = U^-k has the tail index k. The fit sees a tail of 3 sqrt(n) weights: standard error about 0.07 here."""
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimates = []
    for k in (0.2, 0.6, 1.0):
        khat = pareto_khat(-k * uniform.log())
        assert khat == pytest.approx(k, abs=0.2)
        estimates.append(khat)
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.5
    assert estimates[-1] > 0.7


def test_khat_does_not_depend_on_the_scale() -> None:
    log_w = normal(500)
    assert pareto_khat(log_w - 3000.0) == pytest.approx(pareto_khat(log_w), abs=1e-6)
    assert estimate(log_w).khat == pareto_khat(log_w)


def test_bounded_weights_have_no_heavy_tail() -> None:
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert pareto_khat((1 + uniform).log()) < 0.1


def test_equal_weights_are_a_perfect_sampler() -> None:
    got = estimate(torch.full((100,), -321.5))
    assert got == ImportanceEstimate(
        n=100, ess=got.ess, khat=-math.inf, elbo=-321.5, log_z=got.log_z, log_w_variance=0.0,
        log_reward=-321.5, valid=1.0, accepted_elbo=-321.5,
    )  # fmt: skip
    assert got.ess == pytest.approx(1.0, abs=1e-9)
    assert got.log_z == pytest.approx(-321.5, abs=1e-9)


def test_impossible_samples_count_in_ess_and_log_z_only() -> None:
    log_w = torch.tensor([math.log(2.0), -math.inf, math.log(2.0), -math.inf, -math.inf])
    log_r = torch.tensor([-1.0, -math.inf, -3.0, -math.inf, -math.inf])
    got = estimate(log_w, log_r)
    assert got.valid == pytest.approx(0.4)
    assert got.ess == pytest.approx(2 / 5)
    assert got.log_z == pytest.approx(math.log(4 / 5))
    assert got.elbo == -math.inf
    assert got.log_w_variance == 0.0
    assert got.log_reward == pytest.approx(-2.0)
    assert got.accepted_elbo == pytest.approx(math.log(2.0) + math.log(0.4))


def test_khat_is_that_of_the_possible_samples() -> None:
    valid = normal(200)
    log_w = torch.cat([valid[:50], torch.full((300,), -math.inf), valid[50:]])
    assert estimate(log_w).khat == pytest.approx(estimate(valid).khat)
    equal = torch.cat([torch.zeros(50), torch.full((300,), -math.inf)])
    assert estimate(equal).khat == -math.inf, "a sampler that is uniform on what is possible has no tail"


def test_no_possible_sample_at_all() -> None:
    got = estimate(torch.full((4,), -math.inf))
    assert (got.n, got.ess, got.valid) == (4, 0.0, 0.0)
    assert got.elbo == got.log_z == got.log_reward == -math.inf
    assert math.isnan(got.khat)
    assert math.isnan(got.log_w_variance)


def test_one_sample() -> None:
    got = estimate(torch.tensor([-7.25]))
    assert (got.n, got.ess, got.elbo, got.valid) == (1, 1.0, -7.25, 1.0)
    assert got.log_z == pytest.approx(-7.25)
    assert math.isnan(got.log_w_variance), "one sample has no variance, not a variance of 0"
    assert math.isnan(got.khat)


def test_khat_needs_a_tail() -> None:
    assert math.isnan(pareto_khat(normal(MIN_FOR_KHAT - 1)))
    assert not math.isnan(pareto_khat(normal(MIN_FOR_KHAT)))


def test_resampling_counts_by_weight_and_needs_one_above_zero() -> None:
    log_w = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    drawn = resample(log_w, 10, torch.Generator().manual_seed(1))
    assert torch.bincount(drawn, minlength=4).tolist() == [5, 0, 3, 2]
    assert drawn.tolist() == resample(log_w, 10, torch.Generator().manual_seed(1)).tolist()
    with pytest.raises(RewardError, match="all 3 completions drawn have R = 0"):
        resample(torch.full((3,), -torch.inf), 1, torch.Generator())


def test_log_mean_exp_is_of_the_last_dimension() -> None:
    values = torch.tensor([[0.0, 2.0, 6.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert log_mean_exp(values.log()).exp().tolist() == pytest.approx([8 / 3, 1.0])
    assert log_mean_exp(torch.zeros(0)) == -torch.inf


def test_one_huge_weight_leaves_one_effective_sample() -> None:
    log_w = torch.cat([torch.zeros(99), torch.tensor([500.0])])
    assert effective_sample_size(log_w) == pytest.approx(1.0)
    assert estimate(log_w).ess == pytest.approx(0.01)
    assert estimate(log_w).log_z == pytest.approx(500 - math.log(100))


def test_float32_weights_and_gradients_are_no_obstacle() -> None:
    log_w = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    assert estimate(log_w).elbo == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [[], [math.nan], [0.0, math.nan], [math.inf, 0.0]])
def test_undefined_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match=r"at least one log weight, none of them NaN or \+inf"):
        estimate(torch.tensor(bad))
