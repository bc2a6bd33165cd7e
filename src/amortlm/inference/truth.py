"""Draws of the posterior with which a sampler is compared, and whether they can be trusted.

The upper bound on log Z (`amortlm.diagnostics.bounds`) and KL(p || q) need independent draws of the posterior p. The
first of these sources that works is used:

- "enumeration": the support is small enough to list. The draws are exact and independent.
- "sir": a pool of draws of q and of the frozen model (`amortlm.inference.pool`) is divided into disjoint groups, and
  one draw of each group is chosen by importance weight, so the draws are independent. Their distribution differs from p
  by about the relative variance of a group's mean weight. Groups are so large that, by its estimate, this difference is
  at most BIAS nats; `margin` is twice the estimated difference, as a log factor. The source is used if k-hat of the
  pool is below KHAT, or if at least REPEATS weights are above half of the largest. If a gold completion outweighs the
  whole pool, it lies in a mode that the pool has not found, and the source is not used.
- "mcmc": the last states of Metropolis-Hastings chains, one draw per chain. Half of the chains start at particles of
  sequential Monte Carlo, which come from q. The others start at completions of the pool, resampled by weight; half of
  these at gold completions, if there are any. The draws are trusted if R-hat of log R and of log w, over the second
  half of the run, is below RHAT.

A mode that neither q nor the frozen model reaches stays unseen; gold completions can show it.

Draws that cannot be trusted have `trusted` false, and no bound may be computed from them. Chains take most of the time;
a caller may leave them out, and then the source that they would have been is "chains left out".
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amortlm.engine.prefix import pad_right
from amortlm.errors import ConfigError
from amortlm.inference.exact import (
    LIMIT,
    Distance,
    ExactPosterior,
    distance,
    enumerate_posterior,
    policy_log_probs,
)
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.pool import Pool, log_prob, mixed
from amortlm.inference.smc import smc
from amortlm.policy.guide import guided
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row, row_key
from amortlm.weights import resample

logger = logging.getLogger(__name__)
LEFT_OUT = "chains left out"
MORE = 3  # times as many units are added where those are too few
BIAS = 0.02  # nats by which the distribution of an SIR draw may differ from p
ENOUGH = 48  # draws of the posterior: with fewer, more units are drawn
MIN_DRAWS = 16  # with fewer draws of the posterior, bounds are too wide to be of use
PARTICLES = 4  # of sequential Monte Carlo, for each chain that starts at one
CHAINS = 32  # one draw from each; they start in two different ways
THIN = 4  # Metropolis-Hastings steps between two recorded states
RECORDED = 16  # states, the first half of them burn-in
RHAT = 1.1  # of 32 chains by 8 states: independent ones give at most 1.08, correlations of 0.5 at least 1.10


@dataclass(frozen=True)
class Truth:
    """Draws of the posterior of one row (module docstring). Nats.

    rollouts            m completions; None if there are none ("none": the pool was no good, and a support with a tool
                        has no chains)
    log_reward, log_q   [m] of these completions
    source              "enumeration", "sir", "mcmc", LEFT_OUT or "none"
    trusted             may the completions be used as independent draws of p?
    margin              nats by which log Z may be off because their distribution is not exactly p; 0 for enumeration,
                        and for chains, where it is not known
    khat, ess           of the weights of the pool (ess as a share); NaN for enumeration
    rhat                R-hat of the chains; NaN for other sources
    exact, distance     the enumerated posterior, and the distance of q from it; None for other sources
    """

    rollouts: Rollouts | None
    log_reward: Tensor
    log_q: Tensor
    source: str
    trusted: bool
    margin: float = 0.0
    khat: float = math.nan
    ess: float = math.nan
    rhat: float = math.nan
    exact: ExactPosterior | None = None
    distance: Distance | None = None

    @property
    def log_w(self) -> Tensor:
        """[m] float64 log R - log q."""
        return (self.log_reward - self.log_q).double()

    @property
    def label(self) -> str:
        """The source, with "(not converged)" where it is not trusted."""
        if self.trusted:
            return self.source
        return self.source if self.source in (LEFT_OUT, "none") else f"{self.source} (not converged)"


def posterior_draws(
    policy: Policy,
    target: Target,
    row: Row,
    n: int,
    *,
    seed: object,
    limit: int = LIMIT,
    gold: Sequence[str | Sequence[int]] = (),
    chains: bool = True,
) -> Truth:
    """At most n draws of the posterior, from the first source of the module docstring that works.

    limit: the largest support to enumerate; gold: completions (texts or tokens) known to be good; chains: False leaves
    them out. Raises ConfigError for n < 1, DataError for a gold completion outside the support, SupportError for an
    empty enumerated posterior.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    target = target.bind(policy.lm)
    if policy.support.size() <= limit:
        return _enumerated(policy, target, row, n, seed, limit)
    known = policy.rollouts([row], [gold]) if len(gold) > 0 else None
    prior = guided(policy, [row], seed)
    pool, resampled = _resampled(policy, prior, target, row, n, seed, known)
    if resampled.trusted or policy.support.tool is not None:
        return resampled
    if not chains:
        return replace(resampled, source=LEFT_OUT)
    logger.info("Markov chains start, which take most of the time")
    return _chains(policy, target, row, n, seed, known, pool)


def _enumerated(policy: Policy, target: Target, row: Row, n: int, seed: object, limit: int) -> Truth:
    exact = enumerate_posterior(target, policy.support, row, limit)
    index = torch.multinomial(
        exact.log_p.exp(), n, replacement=True, generator=_generator("exact", seed, row)
    )
    tokens, lengths = pad_right([exact.completions[i] for i in index.tolist()], policy.device)
    rollouts = policy.support.rollouts([row], torch.zeros_like(lengths), tokens, lengths)
    log_q = policy_log_probs(policy, row)
    return Truth(
        rollouts,
        exact.log_p[index] + exact.log_z,
        log_q[index],
        "enumeration",
        True,
        exact=exact,
        distance=distance(log_q, exact.log_p),
    )


def _resampled(
    policy: Policy, prior: Policy, target: Target, row: Row, n: int, seed: object, gold: Rollouts | None
) -> tuple[Pool, Truth]:
    """A pool, and one draw by weight from each disjoint group of it. If the weights are too uneven: no draws, not
    trusted."""
    units = max(n, 2 * MIN_DRAWS)
    heaviest = -math.inf if gold is None else _log_w(policy, prior, target, gold).max().item()
    pool = Pool.drawn(policy, prior, target, row, units, (seed, 0))
    for more in (MORE, 0):
        if pool.found and (not pool.usable or heaviest > pool.log_sum):
            break
        size = max(1, math.ceil(pool.spread / BIAS)) if pool.found else len(pool.log_w) + 1
        count = min(n, len(pool.log_w) // size)
        if count >= min(n, ENOUGH if more else MIN_DRAWS):
            index = pool.one_of_each(size, count, _generator("sir", seed, row))
            # Twice the leading term, because the spread is itself an estimate.
            margin = math.log1p(2 * pool.spread / size)
            drawn = pool.rollouts.select(index.to(policy.device))
            log_r, log_q = pool.log_reward.flatten()[index], pool.log_q.flatten()[index]
            return pool, Truth(drawn, log_r, log_q, "sir", True, margin, pool.khat, pool.ess)
        if more:
            pool = pool + Pool.drawn(policy, prior, target, row, more * units, (seed, 1))
    nothing = torch.zeros(0, dtype=torch.float64)
    return pool, Truth(None, nothing, nothing, "none", False, khat=pool.khat, ess=pool.ess)


def _chains(
    policy: Policy, target: Target, row: Row, n: int, seed: object, gold: Rollouts | None, pool: Pool
) -> Truth:
    """The last states of Metropolis-Hastings chains."""
    count = 2 * (max(MIN_DRAWS, min(n, CHAINS)) // 2)
    state = policy.rollouts([row], [_starts(policy, target, row, count // 2, seed, gold, pool)])
    trace_r, trace_w = [], []
    for k in range(RECORDED):
        chains = metropolis_hastings(
            policy, target, row, num_chains=count, num_steps=THIN, seed=(seed, "truth", k), initial=state
        )
        state = chains.rollouts
        trace_r.append(chains.log_reward.cpu())
        trace_w.append((chains.log_reward - chains.log_q).cpu())
    rhat = max(_rhat(torch.stack(trace[RECORDED // 2 :], 1)) for trace in (trace_r, trace_w))
    return Truth(
        state,
        chains.log_reward.cpu(),
        chains.log_q.cpu(),
        "mcmc",
        rhat < RHAT,
        khat=pool.khat,
        ess=pool.ess,
        rhat=rhat,
    )


def _starts(
    policy: Policy, target: Target, row: Row, half: int, seed: object, gold: Rollouts | None, pool: Pool
) -> list[list[int]]:
    """2 half completions with their stop symbols: particles, completions of the pool by weight, gold completions."""
    near, far = (policy.sample([row], half, seed=("chains", seed, k))[0] for k in range(2))
    particles = smc(policy, target, row, num_particles=PARTICLES * half, seed=("truth", seed))
    if particles.log_z > -math.inf:
        near = particles.resample(half, ("truth", seed))
    if pool.found:
        index = resample(pool.log_w.flatten(), half, _generator("starts", seed, row))
        far = pool.rollouts.select(index.to(policy.device))
    known = [] if gold is None else _cycled(gold, half // 2)
    return [*_cycled(near, half), *_cycled(far, half)[len(known) :], *known]


def _cycled(rollouts: Rollouts, n: int) -> list[list[int]]:
    """n completions with their stop symbols; if there are fewer, they are repeated."""
    pairs = zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)
    completions = [[*tokens, stop] for tokens, stop in pairs]
    return [completions[i % len(completions)] for i in range(n)]


def _rhat(trace: Tensor) -> float:
    """Rank-normalised split R-hat of [chains, states], by arviz; inf if a chain is at R = 0 or R-hat is not finite."""
    if not torch.isfinite(trace).all():
        return math.inf
    if trace.max() - trace.min() < 1e-6:
        return 1.0  # q = p (log w), or one completion alone has R > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arviz announces its next major version; 0 / 0 of constant chains
        import arviz

        rhat = float(arviz.rhat(trace.numpy()))
    return rhat if math.isfinite(rhat) else math.inf


def _log_w(policy: Policy, prior: Policy, target: Target, rollouts: Rollouts) -> Tensor:
    """[B] log weights of given completions, as those of a pool."""
    log_m = mixed(log_prob(policy, rollouts), log_prob(prior, rollouts))
    return target.score_final(rollouts).double().cpu() - log_m


def _generator(name: str, seed: object, row: Row) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of((name, seed, row_key(row))))
