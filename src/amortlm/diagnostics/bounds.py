"""Two-sided bounds on log Z, and with them both KL divergences as intervals.

Let w = R / q. The mean weight of K draws of q is an unbiased estimate of Z. Where one of the K is drawn from the
posterior p = R / Z instead, the inverse of the mean weight is an unbiased estimate of 1 / Z (Grosse et al. 2015,
Sobolev & Vetrov 2019). Both estimates are non-negative, and independent non-negative numbers x_1, x_2, .. bound their
expectation from below by betting (Waudby-Smith & Ramdas 2024). If E[x] <= mu, then the capital

    prod_i (1 + lambda (x_i / mu - 1)),    0 < lambda < 1

is non-negative with expectation at most 1: the x_i are independent, so the expectation of the product is the product of
1 + lambda (E[x] / mu - 1) <= 1. By Markov's inequality the capital exceeds 1 / delta with probability at most delta.
Every mu for which it does is rejected, and the largest rejected mu is the lower bound on E[x]: where it is above E[x],
mu = E[x] is rejected too, because the capital falls as mu grows, and that happens with probability at most delta.
Nothing is assumed about the variance or the tail of w.

Which lambda and which K are good depends on q: a small K and a large lambda for a good q, the opposite for a bad one. A
mean of capitals over them, with weights that are fixed beforehand, has an expectation of at most 1 again, whatever they
have to do with each other. So the bound is that of the mean capital, and many lambdas and K cost little: log of the
inverse weight of the best of them, in nats of capital.

The lower bound on log Z needs only draws of q. The upper bound also needs draws of the posterior, and is only as valid
as these: exact draws come from enumeration, approximate draws from resampling or Markov chains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.errors import ConfigError
from amortlm.weights import check_log_weights, log_mean_exp

GRID = 4  # ratio between the group sizes K; the k-th has a weight in proportion to 2^-k
# Values of lambda: 0.97 is good for nearly equal weights, 0.002 for weights that differ by orders of magnitude.
BETS = 1 / (1 + 2.0 ** torch.arange(-5, 10, dtype=torch.float64))


@dataclass(frozen=True)
class Interval:
    """lower <= value <= upper, in nats; either may be infinite."""

    lower: float
    upper: float

    @property
    def width(self) -> float:
        return self.upper - self.lower

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def __str__(self) -> str:
        return f"{self.lower:.3g} .. {self.upper:.3g}"


@dataclass(frozen=True)
class Bounds:
    """Three intervals that hold together with probability `level`. Nats.

    log_z   log Z of the target on the support; valid for any q
    kl_qp   KL(q || p) = log Z - mean log w under q; large if q has probability where p has little
    kl_pq   KL(p || q) = mean log w under p - log Z; large if q misses probability of p
    level   the joint probability

    The intervals of the divergences treat the mean of log w as normal, so they need some dozens of draws.
    """

    log_z: Interval
    kl_qp: Interval
    kl_pq: Interval
    level: float


def log_z_bounds(log_w: Tensor, log_w_true: Tensor | None, level: float = 0.99) -> Interval:
    """An interval in nats that contains log Z with probability `level`.

    log_w [n]: log weights of draws of q, nats, -inf where R = 0. log_w_true [m]: log weights of draws of the posterior,
    or None; then there is no upper bound.

    Raises DataError for NaN, +inf or no draws, ConfigError for a level outside (0, 1).
    """
    log_w = check_log_weights(log_w)
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level}")
    delta = (1 - level) / 2
    lower = lower_bound(log_w, delta)
    if log_w_true is None:
        return Interval(lower, math.inf)
    return Interval(lower, upper_bound(log_w, check_log_weights(log_w_true), delta))


def lower_bound(log_w: Tensor, delta: float) -> float:
    """A number that exceeds log Z with probability at most delta (module docstring)."""
    return _largest_rejected([log_mean_exp(_groups(log_w, size)) for size in _grid(len(log_w))], delta)


def upper_bound(log_w: Tensor, log_w_true: Tensor, delta: float) -> float:
    """A number that is below log Z with probability at most delta. log_w_true [m]: log weights of independent draws of
    the posterior."""
    found = []
    for size in _grid(len(log_w)):
        groups = log_w_true[:, None]
        if size > 1:
            others = _groups(log_w, size - 1)
            count = min(len(others), len(log_w_true))
            groups = torch.cat([log_w_true[:count, None], others[:count]], dim=1)
        found.append(-log_mean_exp(groups))
    return -_largest_rejected(found, delta)


def resampled_tv(log_w: Tensor, log_w_true: Tensor, level: float = 0.99, margin: float = 0.0) -> float:
    """An upper bound, at `level`, on the total variation between p and a draw that is resampled by weight from as many
    draws of q as log_w [n] has. log_w_true [m], margin: as in `bounds`.

    Such a draw is z with probability p(z) E[n Z / (w(z) + sum of n - 1 weights of q)], which is at least
    p(z) n Z / (w(z) + (n - 1) Z) by Jensen's inequality. So the total variation is at most the mean under p of
    (w - Z)+ / (w + (n - 1) Z). This lies in [0, 1] and falls with Z; Z is replaced by its lower bound, at half of the
    error rate, and the mean of 1 minus it bounded by betting, at the other half.
    """
    delta, n = (1 - level) / 2, len(log_w)
    log_z = lower_bound(check_log_weights(log_w), delta)
    if log_z == -math.inf:
        return 1.0
    ratio = (log_w_true.double().cpu() - log_z).exp()
    log_kept = math.log(n) - (ratio + (n - 1)).log()
    found = -math.expm1(_largest_rejected([log_kept.clamp(max=0.0)], delta))
    return min(1.0, math.exp(margin) * found)


def _largest_rejected(estimates: Sequence[Tensor], delta: float) -> float:
    """The largest log mu for which E[x] <= mu is rejected at error rate delta; -inf if none is.

    estimates: tensors of independent log x, x >= 0, one for each K of the grid; all x have the same expectation. The
    capital is averaged over these, weighed by 2^-k, and over BETS. It falls as mu grows, so bisection finds the value.
    """
    shares = torch.tensor([2.0**-k for k in range(len(estimates))], dtype=torch.float64)
    log_shares = (shares / shares.sum()).log()

    def rejects(log_mu: float) -> bool:
        capital = [
            log_mean_exp(torch.log1p(BETS[:, None] * torch.expm1((x - log_mu).clamp(max=600.0))).sum(1))
            for x in estimates
        ]
        return bool((torch.stack(capital) + log_shares).logsumexp(0) > -math.log(delta))

    high = max(x.max().item() for x in estimates)
    # A bet on the largest x alone multiplies the capital enough to reject any mu below this.
    low = high - 60.0 - math.log(max(map(len, estimates))) + math.log(delta)
    if high == -math.inf or not rejects(low):
        return -math.inf
    for _ in range(32):  # to 1e-7 nats
        middle = (low + high) / 2
        low, high = (middle, high) if rejects(middle) else (low, middle)
    return low


def bounds(log_w: Tensor, log_w_true: Tensor | None, level: float = 0.99, margin: float = 0.0) -> Bounds:
    """Intervals for log Z and both KL divergences. Arguments and errors are those of `log_z_bounds`.

    margin: nats by which log Z may be off because the draws behind log_w_true are only approximate draws of the
    posterior; the ends that depend on these draws are wider by the margin.
    """
    third = 1 - (1 - level) / 3
    log_z = log_z_bounds(log_w, log_w_true, third)
    elbo = _mean(check_log_weights(log_w), third)
    eubo = Interval(-math.inf, math.inf) if log_w_true is None else _mean(log_w_true.double().cpu(), third)
    return Bounds(
        log_z=Interval(log_z.lower, log_z.upper + margin),
        kl_qp=_difference(log_z, elbo, above=margin),
        kl_pq=_difference(eubo, log_z, below=margin, above=margin),
        level=level,
    )


def _difference(a: Interval, b: Interval, below: float = 0.0, above: float = 0.0) -> Interval:
    """The interval of a - b, given that a - b >= 0, wider by `below` and `above`."""
    lower, upper = a.lower - b.upper, a.upper - b.lower
    lower = 0.0 if math.isnan(lower) else max(0.0, lower)
    upper = math.inf if math.isnan(upper) else max(0.0, upper)
    return Interval(max(0.0, lower - below), upper + above)


def _mean(values: Tensor, level: float) -> Interval:
    """An interval for the mean of a population, by the central limit theorem; -inf if a value is -inf."""
    if torch.isneginf(values).any():
        return Interval(-math.inf, -math.inf)
    mean = values.mean().item()
    if len(values) < 2:
        return Interval(-math.inf, math.inf)
    z = torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)).item()
    error = z * values.std().item() / math.sqrt(len(values))
    return Interval(mean - error, mean + error)


def _grid(n: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * GRID <= n:
        sizes.append(sizes[-1] * GRID)
    return sizes if sizes[-1] == n else [*sizes, n]


def _groups(values: Tensor, size: int) -> Tensor:
    """[m, size]: the values in groups of `size`, the rest left out."""
    m = len(values) // size
    return values[: m * size].view(m, size)
