"""Functions of log importance weights [n], nats; -inf is a weight of zero."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from amortlm.errors import DataError, RewardError

MIN_FOR_KHAT = 25  # fewer samples leave no tail to fit


def check_log_weights(log_w: Tensor) -> Tensor:
    """log_w as a flat float64 tensor on the CPU. Raises DataError if it is empty or contains NaN or +inf."""
    log_w = log_w.detach().double().flatten().cpu()
    if len(log_w) == 0 or torch.isnan(log_w).any() or torch.isposinf(log_w).any():
        raise DataError("importance diagnostics need at least one log weight, none of them NaN or +inf")
    return log_w


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log of the mean weight over the last dimension: a scalar for [n], [m] for [m, n]; -inf for n = 0."""
    return log_w.logsumexp(-1) - math.log(max(1, log_w.shape[-1]))


def effective_sample_size(log_w: Tensor) -> float:
    """(sum w)^2 / sum w^2, between 1 and n; 0 if every weight is zero."""
    if torch.isneginf(log_w).all():
        return 0.0
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().item()


def pareto_khat(log_w: Tensor) -> float:
    """Pareto k-hat of finite log weights, by arviz's PSIS; NaN for fewer than 25 samples.

    -inf for equal weights (a perfect sampler), which have no tail. NaN also if so many weights are equal that fewer
    than five lie above the cut-off: a fit is then impossible.
    """
    if len(log_w) < MIN_FOR_KHAT:
        return math.nan
    if log_w.max() - log_w.min() < 1e-9:
        return -math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # arviz announces its next major version
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow in a tail, whose k-hat is then infinite
        import arviz

        _, khat = arviz.psislw(log_w.numpy())
    return float(khat) if math.isfinite(khat) else math.nan


def resample(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n indices drawn by weight with replacement (`systematic`). Raises RewardError if every weight is zero."""
    if torch.isneginf(log_weights).all():
        raise RewardError(
            f"all {len(log_weights)} completions drawn have R = 0, so none can be resampled; draw more of them "
            "(a larger budget, more particles), train the policy, or give the constraint a penalty"
        )
    return systematic(log_weights, n, torch.rand((), generator=generator, dtype=torch.float64))


def systematic(log_weights: Tensor, n: int, u: Tensor) -> Tensor:
    """n indices from one uniform number u in [0, 1). Index i occurs n w_i / sum(w) times, up to less than one."""
    cdf = log_weights.double().softmax(0).cumsum(0)
    positions = (torch.arange(n, device=cdf.device) + u) / n
    # right=True: never an index of weight zero.
    return torch.searchsorted(cdf / cdf[-1], positions, right=True).clamp(max=len(cdf) - 1)
