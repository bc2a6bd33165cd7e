"""Sequential Monte Carlo over completions. If the target scores prefixes, the twists cost nothing extra.

N particles are drawn from q. Each has a correction c, 1 at first. The final weight of a particle is c w(z) with
w = R / q, and Z-hat is the mean weight. After t tokens a particle that has stopped has the value c w(z); a live
particle has the value c psi(z_1:t), where the twist psi > 0 is a guess of w. If the effective sample size of the values
is low, N ancestors are drawn in proportion to their values (systematic resampling). The correction of a copy becomes
(mean value) / psi, or (mean value) / w if it has stopped, so that all copies have the same value. Resampling does not
change the expectation of the mean of c f(z), for any f. So E[Z-hat] = Z for any positive psi that depends only on the
first t tokens. The variance is low if psi is close to the expected w given the prefix.

The twist psi of z_1:t is half the weight of stopping there,

    log_w[t] = log R(z_1:t) - log q(z_1:t) - log q(stop | z_1:t),

and half the mean of such weights over the particles. R(z_1:t) / q(z_1:t) is no good twist: it is small in the middle
of every sentence. For q = p and R = p(z y | x) the weight of stopping is p(y | x z_1:t stop). At q = R / Z it is Z at
every state, so all values are equal and nothing is resampled. The mean, weighted by c, is over the particles whose w or
weight of stopping is known. Because of the mean, a live particle keeps at least a third of the copies that c alone
would give it (half if no particle has stopped), even if the weight of stopping now is a bad guess of w.

The weight of stopping is not known before min_tokens, for a target that only judges finished text, and where R = 0 at a
prefix that can still become valid. There psi is the mean over the particles whose weights are known at t, or 1 if none
is known. With psi = 0 some completions could not be reached, and any other constant would compare live particles with
stopped ones on an arbitrary scale. So before min_tokens psi = 1; and for a target that only judges finished text,
particles that stopped with R = 0 are replaced by live ones.

Completions are drawn to their end, and all their states are scored in one `target.score`, which is far cheaper than a
call per token. Resampling at t discards the tokens of the copies after t and redraws them. The decision to resample at
t depends only on the first t tokens, so the result has the distribution of the step-by-step algorithm, with
1 + (resamplings) rounds of decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws
from amortlm.engine.prefix import Prefix
from amortlm.errors import ConfigError
from amortlm.inference.paths import prepare, redraw, rollouts_of, sample_paths, uniforms
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row, row_key
from amortlm.weights import effective_sample_size, log_mean_exp, resample, systematic


@dataclass(frozen=True)
class Particles:
    """N weighted completions of one row: the mean of exp(log_weights) f(z) estimates Z E[f]. Logs are in nats.

    rollouts            N completions; copies of one ancestor may be equal
    log_weights         [N] -inf where R = 0
    log_reward, log_q   [N] of the completions
    log_z               log of the mean weight; exp(log_z) is an unbiased estimate of Z. -inf if every particle has
                        R = 0: an estimate of 0, kept so that averages over runs stay unbiased (`resample` then raises)
    ess                 effective sample size, in particles, of the values at states 1, 2, .. before resampling; the
                        last entry is that of log_weights. 0 if R = 0 for all
    resampled_at        the states at which particles were resampled
    tokens_decoded      policy tokens and stops drawn
    completions_scored  completions judged by the target
    """

    rollouts: Rollouts
    log_weights: Tensor
    log_reward: Tensor
    log_q: Tensor
    log_z: float
    ess: list[float]
    resampled_at: list[int]
    tokens_decoded: int
    completions_scored: int

    def resample(self, n: int, seed: object) -> Rollouts:
        """n completions drawn by weight, with replacement. Raises RewardError if every weight is zero."""
        generator = torch.Generator().manual_seed(seed_of(("resample", seed)))
        return self.rollouts.select(resample(self.log_weights, n, generator))


def smc(
    policy: Policy,
    target: Target,
    row: Row,
    *,
    num_particles: int,
    seed: object,
    ess_threshold: float = 0.5,
) -> Particles:
    """Sequential Monte Carlo from the policy to the posterior (module docstring).

    Resamples at states where ESS < ess_threshold * num_particles. With ess_threshold=0 it never resamples: this is
    plain importance sampling, and only finished completions are scored. Raises ConfigError for num_particles < 1, an
    ess_threshold outside [0, 1] and a support with a tool; other errors as `paths.prepare`.
    """
    if num_particles < 1 or not 0 <= ess_threshold <= 1:
        raise ConfigError(
            f"num_particles={num_particles}, ess_threshold={ess_threshold}: need at least one particle and a "
            "threshold from 0 (never resample) to 1"
        )
    target, prefix = prepare(policy, target, row)
    generator = torch.Generator().manual_seed(seed_of(("smc", seed, row_key(row))))
    cloud = _Cloud(policy, target, row, prefix, generator, target.every_prefix and ess_threshold > 0)
    cloud.draw(num_particles)
    history: list[float] = []
    resampled_at: list[int] = []
    t = 1
    # At max_tokens no token is left to draw: resampling there would only add noise.
    while ess_threshold > 0 and t < policy.support.max_tokens and bool((cloud.paths.lengths >= t).any()):
        log_twist = twists(cloud.log_w, cloud.log_c, cloud.paths.lengths, t, cloud.twisted)
        history.append(effective_sample_size(cloud.log_c + log_twist))
        # With the margin, rounding does not cause resampling of equal values at a threshold of 1.
        if history[-1] < ess_threshold * num_particles * (1 - 1e-9):
            cloud.resample(t, log_twist)
            resampled_at.append(t)
        t += 1
    return cloud.particles(history, resampled_at)


class _Cloud:
    """The particles of a run: completions drawn to their end, their weights of stopping, and their corrections c."""

    paths: Draws
    log_w: Tensor
    log_c: Tensor

    def __init__(
        self,
        policy: Policy,
        target: Target,
        row: Row,
        prefix: Prefix,
        generator: torch.Generator,
        twisted: bool,
    ):
        self.policy, self.target, self.row, self.prefix = policy, target, row, prefix
        self.generator, self.twisted = generator, twisted

    def draw(self, n: int) -> None:
        self.paths, self.decoded = sample_paths(self.policy, self.prefix, n, self.generator)
        self.log_w, self.scored = self._weigh(self.paths, 0), n
        self.log_c = torch.zeros(n, dtype=torch.float64, device=self.policy.device)

    def resample(self, t: int, log_twist: Tensor) -> None:
        """Resample after t tokens, and redraw the tokens of live particles after t."""
        u = uniforms(self.generator, (), self.policy)
        ancestors, self.log_c = resampled(self.log_c, log_twist, u)
        self.paths, self.log_w = self.paths.select(ancestors), self.log_w[ancestors]
        live = (self.paths.lengths >= t).nonzero().squeeze(1)
        if len(live) == 0:
            return
        fresh = redraw(
            self.policy, self.prefix, self.paths.select(live), torch.full_like(live, t), self.generator
        )
        self.paths = self.paths.put(live, fresh)
        self.log_w = self.log_w.index_copy(0, live, self._weigh(fresh, t))
        self.decoded += int((fresh.lengths - t + 1).sum())
        self.scored += len(live)

    def _weigh(self, paths: Draws, start: int) -> Tensor:
        return state_log_weights(self.policy, self.target, self.row, paths, start, self.twisted)

    def particles(self, history: list[float], resampled_at: list[int]) -> Particles:
        final = self.log_w.gather(1, self.paths.lengths[:, None]).squeeze(1)
        log_weights = self.log_c + final
        return Particles(
            rollouts=rollouts_of(self.paths, self.policy, self.row),
            log_weights=log_weights,
            log_reward=final + self.paths.log_q,
            log_q=self.paths.log_q,
            log_z=log_mean_exp(log_weights).item(),
            ess=[*history, effective_sample_size(log_weights)],
            resampled_at=resampled_at,
            tokens_decoded=self.decoded,
            completions_scored=self.scored,
        )


def state_log_weights(
    policy: Policy, target: Target, row: Row, paths: Draws, start: int, every_state: bool
) -> Tensor:
    """log_w [B, max_tokens + 1] float64, nats, at the stopping states from `start` on (every_state), else at the last
    state only; -inf elsewhere."""
    rollouts = rollouts_of(paths, policy, row)
    if every_state:
        states = torch.arange(rollouts.stop_mask.shape[1], device=rollouts.stop_mask.device)
        rollouts = replace(rollouts, stop_mask=rollouts.stop_mask & (states >= start))
    else:
        rollouts = rollouts.final_only()
    mask = torch.nn.functional.pad(rollouts.stop_mask, (0, paths.tokens.shape[1] - rollouts.tokens.shape[1]))
    log_r = target.score(rollouts).double().to(policy.device)[rollouts.stop_mask]
    log_q = torch.nn.functional.pad(paths.log_pf.double().cumsum(1), (1, 0)) + paths.log_pterm.double()
    log_w = torch.full(mask.shape, -torch.inf, dtype=torch.float64, device=policy.device)
    log_w[mask] = log_r - log_q[mask]
    return log_w


def twists(log_w: Tensor, log_c: Tensor, lengths: Tensor, t: int, every_state: bool = True) -> Tensor:
    """[N] log psi after t tokens, or log w of particles that stopped before t. log_w [N, T+1], log_c, lengths [N].

    A particle of length t is live: its stop is not drawn yet. Without every_state, log_w has entries for finished
    completions only, and those of live particles are not used: an entry at t would reveal that the particle stops at t.
    """
    stopped = lengths < t
    log_live = log_w[:, t] if every_state else torch.full_like(log_w[:, t], -torch.inf)
    log_known = torch.where(stopped, log_w.gather(1, lengths[:, None]).squeeze(1), log_live)
    known = stopped | ~torch.isneginf(log_known)
    if not (log_known > -torch.inf).any():
        return torch.where(known, log_known, 0.0)
    log_mean = (log_c + log_known)[known].logsumexp(0) - log_c[known].logsumexp(0)
    log_twist = torch.where(known, torch.logaddexp(log_known, log_mean) - math.log(2), log_mean)
    return torch.where(stopped, log_known, log_twist)


def resampled(log_c: Tensor, log_twist: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(ancestors [N], log c of the copies [N]): every copy has the mean value. u: a uniform number in [0, 1)."""
    log_value = log_c + log_twist
    ancestors = systematic(log_value, len(log_value), u)
    return ancestors, log_mean_exp(log_value) - log_twist[ancestors]
