"""Draws of the posterior with which a sampler is compared, and whether they can be trusted.

The upper bound on log Z (`amortlm.diagnostics.bounds`) and KL(p || q) need independent draws of the posterior p. The
first of these sources that works is used:

- "enumeration": the support is small enough to list. The draws are exact and independent.
- "sir": a pool of draws of q is divided into disjoint groups, and one draw of each group is chosen by importance
  weight, so the draws are independent. Their distribution differs from p by about chi^2(p || q) / group size. Groups
  are so large that, by the estimated chi^2, this difference is at most BIAS nats; `margin` is twice the estimated
  difference, as a log factor. The source is used if k-hat of the pool is below KHAT, or if the largest weight occurs at
  least REPEATS times. The pool does not show a mode that q never visits. If a gold completion outweighs the whole pool,
  there is such a mode, and the source is not used.
- "mcmc": the last states of Metropolis-Hastings chains, one draw per chain. Half of the chains start at particles of
  sequential Monte Carlo, half at gold completions (at draws of q if there are none). The draws are trusted if R-hat of
  log R and of log w, over the second half of the run, is below RHAT. A mode where no chain starts and that q never
  proposes stays unseen; gold completions can show it.

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
from amortlm.inference.correct import weigh
from amortlm.inference.exact import (
    LIMIT,
    Distance,
    ExactPosterior,
    distance,
    enumerate_posterior,
    policy_log_probs,
)
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row, row_key
from amortlm.weights import effective_sample_size, pareto_khat

logger = logging.getLogger(__name__)
LEFT_OUT = "chains left out"
POOL, LARGE_POOL = 4, 16  # draws of q for each draw of the posterior; the second where the first are too few
KHAT = 0.7  # importance weights with a heavier tail cannot be resampled (Vehtari et al. 2024)
REPEATS = 10  # if the largest weight occurs so often, it is not from a heavy tail, which shows it once
BIAS = 0.02  # nats by which the distribution of an SIR draw may differ from p
MIN_DRAWS = 16  # with fewer draws of the posterior, bounds are too wide to be of use
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
    khat, ess           of the weights of the pool of draws of q (ess as a share); NaN for enumeration
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
    resampled = _resampled(policy, target, row, n, seed, _log_w(policy, target, known))
    if resampled.trusted or policy.support.tool is not None:
        return resampled
    if not chains:
        return replace(resampled, source=LEFT_OUT)
    logger.info("Markov chains start, which take most of the time")
    return _chains(policy, target, row, n, seed, known, resampled)


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


def _resampled(policy: Policy, target: Target, row: Row, n: int, seed: object, log_w_gold: Tensor) -> Truth:
    """One draw by weight from each disjoint group of a pool. If the weights are too uneven: no draws, not trusted."""
    nothing = torch.zeros(0, dtype=torch.float64)
    log_r, log_q, parts = nothing, nothing, []
    khat = share = math.nan
    for k, total in enumerate((POOL * max(n, 2 * MIN_DRAWS), LARGE_POOL * max(n, 2 * MIN_DRAWS))):
        more = weigh(policy, target, row, total - len(log_r), seed=("truth", seed, k))
        parts.append(more.rollouts)
        log_r = torch.cat([log_r, more.log_reward.double()])
        log_q = torch.cat([log_q, more.log_q.double()])
        log_w = log_r - log_q
        found = torch.isfinite(log_w)
        if not found.any():
            continue
        share = effective_sample_size(log_w) / total
        khat, chi2 = pareto_khat(log_w[found]), 1 / share - 1
        size = max(POOL, math.ceil(chi2 / BIAS))
        count = min(n, total // size)
        # A gold completion that outweighs the whole pool lies in a mode that q has not found.
        usable = khat < KHAT or _seen_often(log_w)
        if not usable or (log_w_gold > log_w.logsumexp(0)).any():
            break
        if count >= min(n, MIN_DRAWS):
            index = _one_per_group(log_w[: count * size].view(count, size), _generator("sir", seed, row))
            # Twice the leading term, because chi^2 is itself an estimate.
            margin = math.log1p(2 * chi2 / size)
            drawn = Rollouts.cat(parts).select(index.to(policy.device))
            return Truth(drawn, log_r[index], log_q[index], "sir", True, margin, khat, share)
    return Truth(None, nothing, nothing, "none", False, khat=khat, ess=share)


def _seen_often(log_w: Tensor) -> bool:
    """Does the largest weight occur at least REPEATS times? In a heavy tail it would occur once."""
    return int((log_w > log_w.max() - 1e-4).sum()) >= REPEATS


def _one_per_group(groups: Tensor, generator: torch.Generator) -> Tensor:
    """[at most m] positions in the flattened log_w [m, K]: one of each group, by weight; none of a group with R = 0
    for all K."""
    uniform = torch.rand(groups.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    chosen = (groups - (-uniform.log()).log()).argmax(1)  # Gumbel-max
    first = torch.arange(len(groups)) * groups.shape[1]
    return (first + chosen)[torch.isfinite(groups).any(1)]


def _chains(
    policy: Policy, target: Target, row: Row, n: int, seed: object, gold: Rollouts | None, pool: Truth
) -> Truth:
    """The last states of Metropolis-Hastings chains that start at particles and at gold completions (or draws of q)."""
    half = max(MIN_DRAWS, min(n, CHAINS)) // 2
    particles = smc(policy, target, row, num_particles=POOL * half, seed=("truth", seed))
    near = None if particles.log_z == -math.inf else particles.resample(half, ("truth", seed))
    fresh = policy.sample([row], 2 * half, seed=("chains", seed))[0]
    starts = [*_cycled(near or fresh, half), *_cycled(gold or fresh, half, from_end=gold is None)]
    state = policy.rollouts([row], [starts])
    trace_r, trace_w = [], []
    for k in range(RECORDED):
        chains = metropolis_hastings(
            policy, target, row, num_chains=2 * half, num_steps=THIN, seed=(seed, "truth", k), initial=state
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


def _cycled(rollouts: Rollouts, n: int, from_end: bool = False) -> list[list[int]]:
    """n completions with their stop symbols; if there are fewer, they are repeated."""
    pairs = zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)
    completions = [[*tokens, stop] for tokens, stop in pairs]
    completions = completions[::-1] if from_end else completions
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


def _log_w(policy: Policy, target: Target, rollouts: Rollouts | None) -> Tensor:
    if rollouts is None:
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        log_q = policy.evaluate(rollouts).final(rollouts.lengths)
    return (target.score_final(rollouts) - log_q).double().cpu()


def _generator(name: str, seed: object, row: Row) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of((name, seed, row_key(row))))
