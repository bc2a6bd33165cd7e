"""A pool of draws of two proposals, the policy q and the frozen model, from which draws of the posterior are chosen.

The frozen model under the same prompt and support, which looks ahead where the support has an automaton
(`amortlm.guided`), is a proposal that is always at hand. Training can make q lose a mode of the posterior; where the
prior reaches it, the pool still shows it. A draw of either has the weight R / m, where m is the mixture of both in the
shares in which they are drawn (Hesterberg 1995; Veach and Guibas 1995, "balance heuristic"). So the mean weight is an
unbiased estimate of Z, and no weight is above K / OF_Q times that by q alone: a prior that is no good costs its share
of the draws, and no more.

The draws come in units of OF_Q draws of q and OF_PRIOR of the prior. A draw of the posterior is one of the completions
of one or several units, by weight. These groups are disjoint, so the draws are independent. Their distribution differs
from p by about the relative variance of a group's mean weight. By how much draws of q and of the prior differ in mean
weight is not part of it, since every group has equally many of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amortlm.inference.correct import weigh
from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row
from amortlm.weights import effective_sample_size, log_mean_exp, pareto_khat

OF_Q, OF_PRIOR = 4, 4  # draws in a unit
K = OF_Q + OF_PRIOR
KHAT = 0.7  # importance weights with a heavier tail cannot be resampled (Vehtari et al. 2024)
# If so many weights are above half of the largest, it is not from a heavy tail, which shows it once.
REPEATS = 10


@dataclass(frozen=True)
class Pool:
    """U units: completions of q in the first OF_Q columns, of the prior in the others. Logs are in nats.

    rollouts                  U K completions, unit by unit
    log_reward, log_q, log_w  [U, K] float64 on the CPU; log_w = log R - log m (module docstring), -inf where R = 0
    """

    rollouts: Rollouts
    log_reward: Tensor
    log_q: Tensor
    log_w: Tensor

    @classmethod
    def drawn(cls, policy: Policy, prior: Policy, target: Target, row: Row, units: int, seed: object) -> Pool:
        ours = weigh(policy, target, row, OF_Q * units, seed=("truth", seed))
        theirs = weigh(prior, target, row, OF_PRIOR * units, seed=("prior", seed))
        place = torch.arange(K * units)
        order = torch.cat([place[: OF_Q * units].view(units, -1), place[OF_Q * units :].view(units, -1)], 1)

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b]).double()[order]

        log_reward = joined(ours.log_reward, theirs.log_reward)
        log_q = joined(ours.log_q, log_prob(policy, theirs.rollouts))
        log_prior = joined(log_prob(prior, ours.rollouts), theirs.log_q)
        rollouts = Rollouts.cat([ours.rollouts, theirs.rollouts])
        rollouts = rollouts.select(order.flatten().to(rollouts.tokens.device))
        return cls(rollouts, log_reward, log_q, log_reward - mixed(log_q, log_prior))

    def __add__(self, other: Pool) -> Pool:
        rollouts = Rollouts.cat([self.rollouts, other.rollouts])
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("log_reward", "log_q", "log_w")]
        return Pool(rollouts, *(torch.cat(pair) for pair in pairs))

    @cached_property
    def log_sum(self) -> float:
        """log of the sum of all weights; -inf if R = 0 for all completions."""
        return self.log_w.flatten().logsumexp(0).item()

    @cached_property
    def ess(self) -> float:
        """Effective sample size of the weights, as a share of the pool; NaN if R = 0 for all."""
        return effective_sample_size(self.log_w.flatten()) / self.log_w.numel() if self.found else math.nan

    @cached_property
    def khat(self) -> float:
        return pareto_khat(self.log_w[torch.isfinite(self.log_w)])

    @property
    def found(self) -> bool:
        return self.log_sum > -math.inf

    @property
    def usable(self) -> bool:
        """May completions be chosen by these weights?"""
        often = int((self.log_w > self.log_w.max() - math.log(2)).sum()) >= REPEATS
        return self.khat < KHAT or often

    @cached_property
    def spread(self) -> float:
        """The relative variance of the mean weight of a unit."""
        mean = log_mean_exp(self.log_w)
        mean = (mean - mean.max()).exp()
        return (mean.var() / mean.mean() ** 2).item()

    def one_of_each(self, size: int, count: int, generator: torch.Generator) -> Tensor:
        """[at most count] positions in the flattened pool: one of each group of `size` units, by weight; none of a
        group with R = 0 for all."""
        return one_of_each(self.log_w[: count * size].reshape(count, size * K), generator)


def one_of_each(groups: Tensor, generator: torch.Generator) -> Tensor:
    """[at most m] positions in the flattened log_w [m, k]: one of each group, by weight; none of a group with R = 0
    for all k."""
    uniform = torch.rand(groups.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    chosen = (groups - (-uniform.log()).log()).argmax(1)  # Gumbel-max
    first = torch.arange(len(groups)) * groups.shape[1]
    return (first + chosen)[torch.isfinite(groups).any(1)]


def mixed(log_q: Tensor, log_prior: Tensor) -> Tensor:
    """log m of completions, of any shape."""
    return torch.logaddexp(log_q + math.log(OF_Q / K), log_prior + math.log(OF_PRIOR / K))


@torch.no_grad()
def log_prob(policy: Policy, rollouts: Rollouts) -> Tensor:
    """[B] float64 log q of given completions, on the CPU."""
    return policy.evaluate(rollouts).final(rollouts.lengths).double().cpu()
