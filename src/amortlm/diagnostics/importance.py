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
    """Importance estimates from the weights of n samples of q for one posterior. Logs are in nats.

    n               number of samples
    ess             effective sample size as a share of n, in [0, 1]; 1 if q is the posterior
    khat            Pareto tail index of the weights (Vehtari et al. 2024): importance estimates can be trusted below
                    0.7; NaN if there is no tail to fit, -inf for equal weights
    elbo            mean log w; its expectation is log Z - KL(q || p), so at most log Z
    log_z           log of the mean w; its expectation is at most log Z, and it converges to log Z
    log_w_variance  unbiased variance of log w, nats squared; 0 if q is the posterior
    log_reward      mean log R of the samples
    valid           share of samples with R > 0. Below 1 the ELBO is -inf, and khat, log_w_variance and log_reward are
                    those of the samples with R > 0
    accepted_elbo   mean log w of the samples with R > 0, plus log valid: the ELBO of q conditioned on R > 0
    """

    n: int
    ess: float
    khat: float
    elbo: float
    log_z: float
    log_w_variance: float
    log_reward: float
    valid: float
    accepted_elbo: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(log_w: Tensor, log_reward: Tensor | None = None) -> ImportanceEstimate:
    """Importance diagnostics of log_w [n], nats, -inf where R = 0. Raises DataError for no samples, NaN or +inf.

    log_reward [n]: log R, nats, for `log_reward` of the result; without it, that figure is the mean of log_w.
    """
    log_w = check_log_weights(log_w)
    finite = log_w[torch.isfinite(log_w)]
    valid = len(finite) / len(log_w)
    if len(finite) == 0:
        return ImportanceEstimate(
            len(log_w), 0.0, math.nan, -math.inf, -math.inf, math.nan, -math.inf, 0.0, -math.inf
        )
    log_r = finite if log_reward is None else log_reward.double().cpu()[torch.isfinite(log_w)]
    return ImportanceEstimate(
        n=len(log_w),
        ess=effective_sample_size(log_w) / len(log_w),
        khat=pareto_khat(finite),
        elbo=log_w.mean().item(),  # -inf if one weight is 0
        log_z=log_mean_exp(log_w).item(),
        log_w_variance=finite.var().item() if len(finite) > 1 else math.nan,
        log_reward=log_r.mean().item(),
        valid=valid,
        accepted_elbo=finite.mean().item() + math.log(valid),
    )
