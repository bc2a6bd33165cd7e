"""Metropolis-Hastings over completions: redraw a suffix from the policy, accept or keep.

The stationary distribution of the chain is the posterior R / Z on the policy's support, for any policy; the policy
changes only how fast the chain converges.

A step on z of L tokens: t is uniform on {0, .., L}, z_1:t is kept, and the rest of z' (tokens and stop) is drawn from
q(. | z_1:t). t = 0 proposes a new completion; t = L draws again whether to stop after L tokens. Since z' has at least t
tokens, the reverse move can choose the same t. Given t, the density of the move is
q(z' | z_1:t) / (L + 1) = q(z') / (q(z_1:t) (L + 1)), so q(z_1:t) cancels and

    accept with min(1, w(z') (L + 1) / (w(z) (L' + 1))),    w(z) = R(z) / q(z)

does not depend on t. Completions are strings of tokens: q(z) and R(z) both sum over the stop symbols, and the stop
symbol of a result is drawn from q given z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws
from amortlm.errors import ConfigError
from amortlm.inference.paths import paths_of, prepare, redraw, rollouts_of, sample_paths, uniforms
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row, row_key


@dataclass(frozen=True)
class Chains:
    """The last states of C independent chains, and their history over S steps. Logs are in nats.

    rollouts            C completions, one per chain
    log_reward, log_q   [C] of these completions; log_reward is -inf for a chain that has not found R > 0 yet
    accepted            [C, S] bool: accepted proposals (one equal to the current completion is always accepted)
    trace               [C, S+1] log R after 0..S steps, to judge burn-in
    tokens_decoded      policy tokens and stops drawn, one model step each, including the initial completions
    completions_scored  completions judged by the target
    """

    rollouts: Rollouts
    log_reward: Tensor
    log_q: Tensor
    accepted: Tensor
    trace: Tensor
    tokens_decoded: int
    completions_scored: int

    @property
    def acceptance_rate(self) -> float:
        """Share of accepted proposals; NaN for chains of no steps."""
        return self.accepted.double().mean().item()


def metropolis_hastings(
    policy: Policy,
    target: Target,
    row: Row,
    *,
    num_chains: int,
    num_steps: int,
    seed: object,
    initial: Rollouts | None = None,
) -> Chains:
    """`num_chains` chains of `num_steps` steps each, as one batch. Exact for num_steps -> infinity.

    initial: `num_chains` completions in the support at which the chains start (default: draws of the policy). At
    R = 0 every proposal is accepted; a chain with R > 0 never moves to R = 0. Raises DataError for completions outside
    the support or a wrong number of them, ConfigError for a support with a tool, num_chains < 1 or num_steps < 0.
    """
    if num_chains < 1 or num_steps < 0:
        raise ConfigError(
            f"num_chains={num_chains}, num_steps={num_steps}: need at least one chain and at least 0 steps"
        )
    target, prefix = prepare(policy, target, row)
    generator = torch.Generator().manual_seed(seed_of(("mh", seed, row_key(row))))
    if initial is None:
        current, decoded = sample_paths(policy, prefix, num_chains, generator)
    else:
        current, decoded = paths_of(policy, row, initial, num_chains), 0
    log_r = _log_reward(policy, target, row, current)
    trace, accepted = [log_r], [torch.zeros(num_chains, 0, dtype=torch.bool, device=policy.device)]
    for _ in range(num_steps):
        keep = (uniforms(generator, (num_chains,), policy) * (current.lengths + 1)).long()
        proposed = redraw(policy, prefix, current, keep, generator)
        decoded += int((proposed.lengths - keep + 1).sum())
        log_r_new = _log_reward(policy, target, row, proposed)
        log_ratio = acceptance_log_ratio(current, log_r, proposed, log_r_new)
        accept = uniforms(generator, (num_chains,), policy).log() < log_ratio
        current = current.where(accept, proposed)
        log_r = torch.where(accept, log_r_new, log_r)
        trace.append(log_r)
        accepted.append(accept[:, None])
    return Chains(
        rollouts=rollouts_of(current, policy, row),
        log_reward=log_r,
        log_q=current.log_q,
        accepted=torch.cat(accepted, dim=1),
        trace=torch.stack(trace, dim=1),
        tokens_decoded=decoded,
        completions_scored=num_chains * (num_steps + 1),
    )


def _log_reward(policy: Policy, target: Target, row: Row, paths: Draws) -> Tensor:
    return target.score_final(rollouts_of(paths, policy, row)).double().to(policy.device)


def acceptance_log_ratio(current: Draws, log_r: Tensor, proposed: Draws, log_r_new: Tensor) -> Tensor:
    """[B] log of w(z') (L + 1) / (w(z) (L' + 1)), w = R / q; +inf where R(z) = 0 (see `metropolis_hastings`)."""
    cut = (current.lengths + 1).double().log() - (proposed.lengths + 1).double().log()
    log_ratio = (log_r_new - proposed.log_q) - (log_r - current.log_q) + cut
    return log_ratio.masked_fill(torch.isneginf(log_r), torch.inf)
