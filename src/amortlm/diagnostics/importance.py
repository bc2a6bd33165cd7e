"""Diagnostics from the importance weights log w = log R(z) - log q(z) of samples of q."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from amortlm.weights import check_log_weights, effective_sample_size, log_mean_exp, pareto_khat


@dataclass(frozen=True)
class ImportanceEstimate:
    """What n samples of q say about one posterior. Nats.

    ess             effective sample size as a share of n, in (0, 1]; 1 = q is the posterior
    khat            Pareto tail index of the weights (Vehtari et al. 2024): below 0.7 importance estimates can be
                    trusted; NaN where there is no tail to fit
    elbo            mean log w, a lower bound on log Z in expectation: log Z - elbo = KL(q || p)
    log_z           log mean w: a tighter lower bound in expectation, consistent
    log_w_variance  unbiased variance of log w; 0 = q is the posterior
    log_reward      mean log R of the samples
    valid           share of samples with R > 0; where it is below 1 the ELBO is -inf, and the other figures
                    except ess and log_z are those of the valid samples
    """

    n: int
    ess: float
    khat: float
    elbo: float
    log_z: float
    log_w_variance: float
    log_reward: float
    valid: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(log_w: Tensor, log_reward: Tensor | None = None) -> ImportanceEstimate:
    """Importance diagnostics of log_w [n] (-inf where R = 0). Raises DataError for no samples or NaN."""
    log_w = check_log_weights(log_w)
    finite = log_w[torch.isfinite(log_w)]
    valid = len(finite) / len(log_w)
    if len(finite) == 0:
        return ImportanceEstimate(len(log_w), 0.0, math.nan, -math.inf, -math.inf, math.nan, -math.inf, 0.0)
    reward = -math.inf if valid < 1 else None
    log_r = finite if log_reward is None else log_reward.double().cpu()[torch.isfinite(log_w)]
    return ImportanceEstimate(
        n=len(log_w),
        ess=effective_sample_size(log_w) / len(log_w),
        khat=pareto_khat(finite),
        elbo=finite.mean().item() if reward is None else reward,
        log_z=log_mean_exp(log_w).item(),
        log_w_variance=finite.var().item() if len(finite) > 1 else math.nan,
        log_reward=log_r.mean().item(),
        valid=valid,
    )
