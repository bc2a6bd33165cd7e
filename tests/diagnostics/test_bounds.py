"""The interval for log Z and both divergences holds at its level on known weights, whatever the proposal."""

from __future__ import annotations

import math

import pytest
import torch
from stats import LEVEL, binomial_tail
from torch import Tensor

from amortlm.diagnostics import bounds as module
from amortlm.diagnostics.bounds import bounds, log_z_bounds, lower_bound, resampled_tv, upper_bound
from amortlm.errors import ConfigError, DataError
from amortlm.weights import log_mean_exp

RUNS, DRAWS, LOG_Z = 500, 256, 1.7


def proposal(scale: float, size: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, log w) over a few outcomes; scale: how far log q is from log p."""
    generator = torch.Generator().manual_seed(3)
    log_p = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(0)
    log_q = (log_p + scale * torch.randn(size, generator=generator, dtype=torch.float64)).log_softmax(0)
    return log_p.exp(), log_q.exp(), LOG_Z + log_p - log_q


def draws(weights: Tensor, log_w: Tensor, run: int, n: int = DRAWS) -> Tensor:
    generator = torch.Generator().manual_seed(run)
    return log_w[torch.multinomial(weights, n, replacement=True, generator=generator)]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0])
def test_covers_at_its_level(scale: float) -> None:
    p, q, log_w = proposal(scale)
    kl_qp, kl_pq = (q * (q / p).log()).sum().item(), (p * (p / q).log()).sum().item()
    misses = 0
    for run in range(RUNS):
        found = bounds(draws(q, log_w, run), draws(p, log_w, RUNS + run), level=0.99)
        # 1e-9: at scale 0 the divergences are 0 up to rounding.
        inside = (
            LOG_Z in found.log_z and kl_qp + 1e-9 >= found.kl_qp.lower and kl_qp <= found.kl_qp.upper + 1e-9
        )
        misses += not (inside and found.kl_pq.lower <= kl_pq + 1e-9 and kl_pq <= found.kl_pq.upper + 1e-9)
    assert binomial_tail(misses, RUNS, 0.01) > LEVEL, misses


def test_interval_closes_with_more_draws() -> None:
    p, q, log_w = proposal(0.1)
    widths = [log_z_bounds(draws(q, log_w, 0, n), draws(p, log_w, 1, n)).width for n in (64, 512, 4096)]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    assert widths[2] < 0.02


def test_a_proposal_that_misses_a_mode_is_caught() -> None:
    """Half of the posterior has q of nearly nothing: draws of q alone look perfect, the upper bound does not."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)
    log_w = LOG_Z + p.log() - q.log()
    seen, true = draws(q, log_w, 0), draws(p, log_w, 1)
    assert seen.std() < 1e-12  # nothing in them tells
    found = bounds(seen, true)
    assert LOG_Z in found.log_z
    assert found.kl_pq.lower > 1.0  # the truth: 9.7 nats
    assert LOG_Z not in log_z_bounds(seen, seen)  # control: "posterior draws" that miss it too are believed


def test_draws_that_are_not_of_the_posterior_break_the_upper_bound() -> None:
    """Control: the guarantee rests on exact draws. Draws of the wrong distribution exclude the truth."""
    _, q, log_w = proposal(1.0)
    wrong = draws(q, log_w, 1, 4096)
    assert not any(LOG_Z in log_z_bounds(draws(q, log_w, run, 4096), wrong) for run in range(5))


def test_rejected_draws_and_no_truth() -> None:
    log_w = torch.tensor([-math.inf, 0.5, 1.0, -math.inf] * 16)
    found = bounds(log_w, None)
    assert math.isfinite(found.log_z.lower)
    assert found.log_z.upper == math.inf
    assert found.kl_qp.upper == math.inf
    assert found.kl_pq.upper == math.inf
    assert bounds(torch.full((8,), -math.inf), None).log_z.lower == -math.inf


def heavy(name: str, size: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, log w) with log Z = LOG_Z and weights that differ by orders of magnitude; q is even over the outcomes."""
    u = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    if name == "lognormal":
        log_w = 2.0 * torch.special.ndtri(u)
    elif name == "pareto":
        log_w = -u.log() / 1.2  # no variance, were it not cut off
    else:
        log_w = torch.where(u < 0.004, 4.0, -0.5).double()  # "lost": a mode that q visits once in 250
    log_q = torch.full((size,), -math.log(size), dtype=torch.float64)
    log_p = (log_q + log_w).log_softmax(0)
    return log_p.exp(), log_q.exp(), LOG_Z + log_p - log_q


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lognormal", "pareto", "lost"])
def test_each_end_holds_for_heavy_tails(name: str) -> None:
    p, q, log_w = heavy(name)
    runs, delta, misses = 100, 0.1, [0, 0]
    for run in range(runs):
        drawn, true = draws(q, log_w, run), draws(p, log_w, runs + run, 64)
        misses[0] += lower_bound(drawn, delta) > LOG_Z
        misses[1] += upper_bound(drawn, true, delta) < LOG_Z
    assert all(binomial_tail(found, runs, delta) > LEVEL for found in misses), misses


@pytest.mark.slow
def test_a_broken_bet_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: a sum of capitals in the place of their mean does not keep its level."""
    monkeypatch.setattr(module, "log_mean_exp", lambda x: x.logsumexp(0) if x.dim() == 1 else log_mean_exp(x))
    x = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    q = torch.tensor([0.99, 0.01], dtype=torch.float64)
    misses = sum(lower_bound(draws(q, x, run, 64), 0.1) > math.log(0.99) for run in range(100))
    assert binomial_tail(misses, 100, 0.1) < LEVEL, misses
    monkeypatch.undo()
    misses = sum(lower_bound(draws(q, x, run, 64), 0.1) > math.log(0.99) for run in range(100))
    assert binomial_tail(misses, 100, 0.1) > LEVEL, misses


def test_near_the_posterior_the_interval_is_narrow() -> None:
    """At a total variation of .1, from 256 draws of q and 64 of p."""
    p, q, log_w = proposal(0.25)
    assert 0.09 < (p - q).abs().sum() / 2 < 0.12
    widths = [log_z_bounds(draws(q, log_w, run), draws(p, log_w, 99 + run, 64)).width for run in range(9)]
    assert sorted(widths)[4] <= 0.3


def resampled_law(q: Tensor, w: Tensor, n: int, runs: int = 20_000) -> Tensor:
    """The law of one of n draws of q by weight, from `runs` pools."""
    pools = torch.multinomial(q.expand(runs, -1), n, True, generator=torch.Generator().manual_seed(0))
    place = torch.multinomial(w[pools], 1, generator=torch.Generator().manual_seed(1))
    return torch.bincount(pools.gather(1, place).squeeze(1), minlength=len(q)) / runs


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_the_total_variation_of_resampled_draws(scale: float) -> None:
    """It is never below the truth, tells near from far, and knows the mode that q has lost."""
    p, q, log_w = proposal(scale)
    true = (resampled_law(q, log_w.exp(), 32) - p).abs().sum().item() / 2
    found = [resampled_tv(draws(q, log_w, run, 32), draws(p, log_w, 99 + run)) for run in range(20)]
    noise = 0.01  # of the frequencies
    assert all(x > true - noise for x in found), (found, true)
    if scale == 0.25:
        assert max(found) < 0.2
    lost = torch.tensor([0.4, 0.6], dtype=torch.float64)
    q = torch.tensor([1e-6, 1.0], dtype=torch.float64)
    log_w = lost.log() - q.log()
    assert resampled_tv(draws(q, log_w, 0), draws(lost, log_w, 1)) > 0.4


def test_one_sided_bounds_agree_with_the_interval() -> None:
    p, q, log_w = proposal(0.1)
    a, b = draws(q, log_w, 0), draws(p, log_w, 1)
    interval = log_z_bounds(a, b, level=0.9)
    assert interval.lower == lower_bound(a.double(), 0.05)
    assert interval.upper == upper_bound(a.double(), b.double(), 0.05)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="NaN"):
        bounds(torch.tensor([math.nan, 1.0]), None)
    with pytest.raises(ConfigError, match="level"):
        log_z_bounds(torch.zeros(4), None, level=1.0)
