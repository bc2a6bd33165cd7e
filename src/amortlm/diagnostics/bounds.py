"""Two-sided bounds on log Z, and with them both KL divergences as intervals.

With w = R / q, a mean of K weights of draws of q is an unbiased estimate of Z. With one of the K draws taken from
the posterior p = R / Z instead, the inverse of the mean is an unbiased estimate of 1 / Z (importance sampling on the
space of K draws and the place of the true one: Grosse et al. 2015, Sobolev & Vetrov 2019). Neither is ever negative,
and that alone bounds their expectation from below by a bet (Waudby-Smith & Ramdas 2024): if E[x] <= mu, then

    prod_i (1 + lambda (x_i / mu - 1)),    0 < lambda < 1

is a non-negative number with expectation at most 1, so it exceeds 1 / delta with probability at most delta; the
least mu that it does not refute is the bound. No variance is estimated and no limit theorem assumed, however heavy
the tail of w. A small K suits a good q, a large one a bad q; every K of a grid is tried, and delta shared.

The lower bound needs nothing but draws of q. The upper one is valid as far as the draws it takes for those of the
posterior are: exactly, where they come from enumeration; approximately, where they come from SMC or MCMC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.errors import ConfigError
from amortlm.weights import check_log_weights

GRID = 16  # ratio between the group sizes that are tried
BETS = 1 / (
    1 + 2.0 ** torch.arange(-5, 10, dtype=torch.float64)
)  # 0.97 for weights nearly equal, 0.002 for wild ones


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
    """What is known of one posterior at `level`: each of the three holds jointly with probability `level`. Nats.

    log_z   of the target on the support
    kl_qp   KL(q || p), what samples of q make up: log Z - mean log w under q
    kl_pq   KL(p || q), what q misses: mean log w under p - log Z
    log Z holds without assumption on q; the mean log w of a finite number of draws by its normal limit.
    """

    log_z: Interval
    kl_qp: Interval
    kl_pq: Interval
    level: float


def log_z_bounds(log_w: Tensor, log_w_true: Tensor | None, level: float = 0.99) -> Interval:
    """log Z at a level from log_w [n] of draws of q and log_w_true [m] of draws of the posterior (None: no upper
    bound). -inf in log_w stands for R = 0. Raises DataError for NaN or no draws, ConfigError for the level."""
    log_w = check_log_weights(log_w)
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level}")
    delta = (1 - level) / 2
    lower = lower_bound(log_w, delta)
    if log_w_true is None:
        return Interval(lower, math.inf)
    return Interval(lower, upper_bound(log_w, check_log_weights(log_w_true), delta))


def lower_bound(log_w: Tensor, delta: float) -> float:
    """A number above log Z with probability at most delta (module docstring)."""
    sizes = _grid(len(log_w))
    return max(_refuted(_log_mean(_groups(log_w, size)), delta / len(sizes)) for size in sizes)


def upper_bound(log_w: Tensor, log_w_true: Tensor, delta: float) -> float:
    """A number below log Z with probability at most delta; log_w_true are independent draws of the posterior."""
    sizes = _grid(len(log_w))
    found = []
    for size in sizes:
        groups = log_w_true[:, None]
        if size > 1:
            others = _groups(log_w, size - 1)
            count = min(len(others), len(log_w_true))
            groups = torch.cat([log_w_true[:count, None], others[:count]], dim=1)
        found.append(-_refuted(-_log_mean(groups), delta / len(sizes)))
    return min(found)


def _refuted(log_x: Tensor, delta: float) -> float:
    """The largest log mu for which x [m] >= 0, independent, refute E[x] <= mu at odds of 1 / delta; -inf: none.

    Capital is an average over bets; each falls in mu, so the edge is found by bisection.
    """

    def refutes(log_mu: float) -> bool:
        gain = torch.log1p(BETS[:, None] * torch.expm1((log_x - log_mu).clamp(max=600.0))).sum(1)
        return bool(_log_mean(gain[None]) > -math.log(delta))

    high = log_x.max().item()
    # Capital is at most prod (x_i / mu), so below this mu every set of draws with a large x refutes.
    low = high - 50.0 - math.log(len(log_x)) + math.log(delta)
    if high == -math.inf or not refutes(low):
        return -math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return low


def bounds(log_w: Tensor, log_w_true: Tensor | None, level: float = 0.99) -> Bounds:
    """log Z and both KL divergences. log_w [n] of draws of q, log_w_true [m] of draws of the posterior, or None.

    Raises DataError, ConfigError (see `log_z_bounds`).
    """
    third = 1 - (1 - level) / 3
    log_z = log_z_bounds(log_w, log_w_true, third)
    elbo = _mean(check_log_weights(log_w), third)
    eubo = Interval(-math.inf, math.inf) if log_w_true is None else _mean(log_w_true.double().cpu(), third)
    return Bounds(
        log_z=log_z,
        kl_qp=_difference(log_z, elbo),
        kl_pq=_difference(eubo, log_z),
        level=level,
    )


def _difference(a: Interval, b: Interval) -> Interval:
    """a - b for what cannot be negative."""
    lower, upper = a.lower - b.upper, a.upper - b.lower
    return Interval(
        0.0 if math.isnan(lower) else max(0.0, lower), math.inf if math.isnan(upper) else max(0.0, upper)
    )


def _mean(values: Tensor, level: float) -> Interval:
    """The mean of a population by the normal limit; -inf among the values makes it -inf."""
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


def _log_mean(values: Tensor) -> Tensor:
    """[m] log of the mean of exp(values) over the last dimension of [m, K]."""
    return values.logsumexp(-1) - math.log(values.shape[-1])
