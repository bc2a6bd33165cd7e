"""Draws of the posterior with a policy as proposal: SIR, SMC and Metropolis-Hastings behind one function.

All three converge to the exact posterior on the policy's support as the budget grows, for any policy. Completions are
drawn in batches that fit in memory: parts of one pool for SIR, independent runs ("islands") for SMC, independent chains
for Metropolis-Hastings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from amortlm.errors import ConfigError, nearest
from amortlm.inference.mcmc import Chains, metropolis_hastings
from amortlm.inference.paths import refuse_tool
from amortlm.inference.smc import smc
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row, row_key
from amortlm.weights import effective_sample_size, log_mean_exp, resample

BATCH = 256  # completions sampled and scored at once
METHODS = ("none", "sir", "smc", "mh")
START = 4  # Metropolis-Hastings uses 1 / START of its budget to choose where its chains start


@dataclass(frozen=True)
class Weighted:
    """N completions whose weights make them represent the posterior. Logs are in nats.

    log_q, log_reward, log_weights   [N], on the CPU; the mean weight is an unbiased estimate of Z
    draws                            completions drawn from q in all; a redrawn suffix counts as one
    """

    rollouts: Rollouts
    log_q: Tensor
    log_reward: Tensor
    log_weights: Tensor
    draws: int

    @property
    def log_z(self) -> float:
        return log_mean_exp(self.log_weights.double()).item()

    @property
    def ess(self) -> float:
        """Effective sample size, 1 to N; 0 if R = 0 for all."""
        return effective_sample_size(self.log_weights.double())

    def resample(self, n: int, seed: object) -> Weighted:
        """n completions drawn by weight, with replacement, in random order, each with log weight 0.

        Raises RewardError if every weight is zero.
        """
        generator = torch.Generator().manual_seed(seed_of(("resample", seed, row_key(self.rollouts.rows[0]))))
        # Sort equal completions next to each other: then the number of copies of each is within 1 of its expectation.
        completions = self.rollouts.completions()
        order = torch.tensor(sorted(range(len(completions)), key=completions.__getitem__))
        picked = order[resample(self.log_weights[order], n, generator)]
        index = picked[torch.randperm(n, generator=generator)]
        return Weighted(
            rollouts=self.rollouts.select(index.to(self.rollouts.tokens.device)),
            log_q=self.log_q[index],
            log_reward=self.log_reward[index],
            log_weights=torch.zeros(n),
            draws=self.draws,
        )


@dataclass(frozen=True)
class Corrected:
    """n draws of the posterior, of equal weight, and figures of the correction (see `posterior.Samples`)."""

    drawn: Weighted
    ess: float | None = None
    log_z: float | None = None
    acceptance_rate: float | None = None


def corrected(
    policy: Policy,
    target: Target,
    row: Row,
    n: int,
    *,
    method: str,
    budget: int | None,
    seed: object,
) -> Corrected:
    """n draws of the posterior of `row` by "sir", "smc" or "mh". budget: see `Posterior.sample`.

    Raises ConfigError for an unknown method, n < 1, a budget too small for n and, for "smc" and "mh", a support with a
    tool; RewardError if every completion drawn has R = 0.
    """
    check_method(method)
    check_n(n)
    budget = max(256, 16 * n) if budget is None else budget
    least = 2 * n if method == "mh" else n  # a chain takes at least one step
    if budget < least:
        raise ConfigError(f"a budget of {budget} is too small for n={n}: {method} needs at least {least}")
    if method == "mh":
        return mh(policy, target, row, n, budget=budget, seed=seed)
    pool = (weigh if method == "sir" else islands)(policy, target, row, budget, seed=seed)
    return Corrected(pool.resample(n, seed), ess=pool.ess, log_z=pool.log_z)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown correction {method!r}; {nearest(str(method), METHODS)}")


def require_target(target: Target | None) -> Target:
    """The target of a posterior. Raises ConfigError if there is none."""
    if target is None:
        raise ConfigError(
            "this posterior has no target, so its samples cannot be weighed or corrected: pass target= to Posterior "
            "or from_pretrained. A posterior is saved without its target if a function cannot be imported by name; "
            "for the command line, define the function in a module, save again, and give --trust MODULE"
        )
    return target


def check_n(n: int) -> None:
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")


def draw(
    policy: Policy, target: Target | None, row: Row, n: int, *, seed: object
) -> tuple[Rollouts, Tensor, Tensor | None]:
    """n draws of the policy, their log q [n] and, with a target, log R [n], on the CPU; nats. Raises ConfigError for
    n < 1."""
    check_n(n)
    parts, log_q, log_r = [], [], []
    for start in range(0, n, BATCH):
        rollouts, log_probs = policy.sample([row], min(BATCH, n - start), seed=(seed, start))
        parts.append(rollouts)
        log_q.append(log_probs.final(rollouts.lengths).float().cpu())
        if target is not None:
            log_r.append(target.score_final(rollouts).cpu())
    return Rollouts.cat(parts), torch.cat(log_q), torch.cat(log_r) if log_r else None


def weigh(policy: Policy, target: Target, row: Row, n: int, *, seed: object) -> Weighted:
    """n draws of the policy with their importance weights. The support may have a tool."""
    rollouts, log_q, log_reward = draw(policy, target, row, n, seed=seed)
    assert log_reward is not None
    return Weighted(rollouts, log_q, log_reward, log_reward - log_q, n)


def islands(policy: Policy, target: Target, row: Row, n: int, *, seed: object) -> Weighted:
    """n particles from independent runs of `smc` of about equal size; their mean weight is an unbiased estimate of Z,
    as in each run."""
    parts = [
        smc(policy, target, row, num_particles=high - low, seed=(seed, low)) for low, high in even(n, BATCH)
    ]
    return Weighted(
        rollouts=Rollouts.cat([p.rollouts for p in parts]),
        log_q=torch.cat([p.log_q for p in parts]).cpu(),
        log_reward=torch.cat([p.log_reward for p in parts]).cpu(),
        log_weights=torch.cat([p.log_weights for p in parts]).cpu(),
        draws=sum(p.completions_scored for p in parts),
    )


def mh(policy: Policy, target: Target, row: Row, n: int, *, budget: int, seed: object) -> Corrected:
    """The last states of n Metropolis-Hastings chains.

    1 / START of the budget is drawn from q and resampled by weight. Chains that start at these completions are nearer
    to the posterior than chains that start at draws of q, and all of them start, and so stay, where R > 0.
    """
    refuse_tool(policy)
    pool = weigh(policy, target, row, max(1, budget // START), seed=seed)
    initial = pool.resample(n, seed).rollouts
    steps = (budget - pool.draws) // n
    parts: list[Chains] = []
    for low, high in even(n, BATCH):
        chosen = initial.select(torch.arange(low, high, device=initial.tokens.device))
        parts.append(
            metropolis_hastings(
                policy,
                target,
                row,
                num_chains=high - low,
                num_steps=steps,
                seed=(seed, low),
                initial=chosen,
            )
        )
    drawn = Weighted(
        rollouts=Rollouts.cat([p.rollouts for p in parts]),
        log_q=torch.cat([p.log_q for p in parts]).cpu(),
        log_reward=torch.cat([p.log_reward for p in parts]).cpu(),
        log_weights=torch.zeros(n),
        draws=pool.draws + n * steps,
    )
    rate = sum(p.acceptance_rate * len(p.rollouts) for p in parts) / n
    return Corrected(drawn, acceptance_rate=rate)


def even(n: int, batch: int) -> Iterator[tuple[int, int]]:
    """[low, high) of the fewest pieces of at most `batch`, with sizes that differ by at most one."""
    count = math.ceil(n / batch)
    bounds = [n * i // count for i in range(count + 1)]
    return pairwise(bounds)
