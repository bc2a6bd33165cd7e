"""Completions under construction: draw them, and redraw the rest of them from any prefix on.

What Metropolis-Hastings and sequential Monte Carlo share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.data import check_rows
from amortlm.engine.passes import Prefix
from amortlm.errors import ConfigError, DataError
from amortlm.policy.policy import Policy
from amortlm.support import SupportLaw
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.types import PolicyLogProbs, Rollouts, Row


@dataclass(frozen=True)
class Paths:
    """B completions of one row and their log q, at the full width T = max_tokens so that they can grow.

    tokens [B, T], lengths [B], stops [B], log_pf [B, T] (0 beyond the length), log_pterm [B, T+1] (log q(stop) at
    the states reached, -inf else)
    """

    tokens: Tensor
    lengths: Tensor
    stops: Tensor
    log_pf: Tensor
    log_pterm: Tensor

    @property
    def log_q(self) -> Tensor:
        """[B] float64 log q(z), the stop included."""
        return PolicyLogProbs(self.log_pf.double(), self.log_pterm.double()).final(self.lengths)

    def select(self, index: Tensor) -> Paths:
        return Paths(**{name: x[index] for name, x in self.__dict__.items()})

    def where(self, mask: Tensor, other: Paths) -> Paths:
        """`other` where mask [B], else these."""
        return Paths(
            **{
                name: torch.where(mask if x.dim() == 1 else mask[:, None], getattr(other, name), x)
                for name, x in self.__dict__.items()
            }
        )

    def put(self, index: Tensor, other: Paths) -> Paths:
        """These with the paths at `index` replaced by `other`."""
        return Paths(
            **{name: x.index_copy(0, index, getattr(other, name)) for name, x in self.__dict__.items()}
        )

    def rollouts(self, policy: Policy, row: Row) -> Rollouts:
        """As rollouts of `row`, trimmed to the longest."""
        width = max(int(self.lengths.max()), 1)
        zero = torch.zeros_like(self.lengths)
        return policy.support.rollouts([row], zero, self.tokens[:, :width], self.lengths, self.stops)


def prepare(policy: Policy, target: Target, row: Row) -> tuple[Target, Prefix]:
    """The target bound to the policy's tokenizer and the encoded prompt of `row`.

    Raises ConfigError for a support with a tool, SupportError for one that the target's latents do not fit,
    DataError for a missing column, PromptTooLongError.
    """
    refuse_tool(policy)
    check_rows([row], set(policy.prompt.columns) | set(target.columns), "the row")
    target = target.bind(policy.lm)
    check_statements(target, policy.support)
    with torch.no_grad():
        prefix = policy.passes.encode(policy.encode_rows([row]))
    return target, prefix


def refuse_tool(policy: Policy) -> None:
    if policy.support.tool is not None:
        raise ConfigError(
            "Metropolis-Hastings and sequential Monte Carlo cannot cut a completion that a tool writes into; "
            'use a support without a tool, or posterior.sample(..., correct="sir")'
        )


def sample_paths(policy: Policy, prefix: Prefix, n: int, generator: torch.Generator) -> tuple[Paths, int]:
    """n draws of the policy and the number of tokens and stops drawn."""
    width, device = policy.support.max_tokens, policy.device
    zeros = torch.zeros(n, dtype=torch.long, device=device)
    blank = Paths(
        tokens=torch.zeros(n, width, dtype=torch.long, device=device),
        lengths=zeros,
        stops=zeros,
        log_pf=torch.zeros(n, width, device=device),
        log_pterm=torch.full((n, width + 1), -torch.inf, device=device),
    )
    paths = redraw(policy, prefix, blank, zeros, generator)
    return paths, int((paths.lengths + 1).sum())


@torch.no_grad()
def paths_of(policy: Policy, row: Row, rollouts: Rollouts, n: int) -> Paths:
    """Paths of n given completions. Raises DataError for another count or a completion outside the support."""
    if len(rollouts) != n:
        raise DataError(f"initial has {len(rollouts)} completions for {n} chains; give one per chain")
    completions = [[*z, s] for z, s in zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)]
    parsed = policy.rollouts([row], [completions])
    log_probs = policy.evaluate(parsed)
    missing = policy.support.max_tokens - parsed.tokens.shape[1]
    pad = torch.nn.functional.pad
    return Paths(
        tokens=pad(parsed.tokens, (0, missing)),
        lengths=parsed.lengths,
        stops=parsed.stops,
        log_pf=pad(log_probs.log_pf, (0, missing)),
        log_pterm=pad(log_probs.log_pterm, (0, missing), value=-torch.inf),
    )


def uniforms(generator: torch.Generator, shape: tuple[int, ...], policy: Policy) -> Tensor:
    """Uniforms in [0, 1), float64, drawn on the CPU: the same on every device."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(policy.device)


@torch.no_grad()
def redraw(policy: Policy, prefix: Prefix, paths: Paths, keep: Tensor, generator: torch.Generator) -> Paths:
    """Draw the rest of each path from q(. | z_1:keep). keep [B] tokens stay, with their log q.

    prefix: the one encoded prompt. One pass over the kept tokens, then one per new token; each path draws from its
    own state (keep of them differ), and those that have stopped leave the batch.
    """
    support, passes = policy.support, policy.passes
    u = uniforms(generator, (len(keep), support.max_tokens + 1), policy)
    position = torch.arange(support.max_tokens + 1, device=keep.device)
    tokens = paths.tokens.masked_fill(position[:-1] >= keep[:, None], 0)
    log_pf = paths.log_pf.masked_fill(position[:-1] >= keep[:, None], 0.0)
    log_pterm = paths.log_pterm.masked_fill(position >= keep[:, None], -torch.inf)
    lengths, stops = keep.clone(), torch.zeros_like(keep)
    kept = [z[:n] for z, n in zip(tokens.tolist(), keep.tolist(), strict=True)]
    writer = passes.write(
        passes.extend(prefix, torch.zeros_like(keep), kept), torch.arange(len(keep)).to(keep.device)
    )
    alive, state = torch.arange(len(keep), device=keep.device), keep
    at = support.positions(tokens)[alive, keep]
    while len(alive) > 0:
        logits = writer.logits()
        legal = support.legal(state, at)
        log_q, log_pterm[alive, state] = _state_log_probs(logits, state, support, legal)
        token = _inverse_cdf(log_q, u[alive, state])
        done = torch.isin(token, torch.tensor(support.stop_ids, device=token.device))
        lengths[alive[done]], stops[alive[done]] = state[done], token[done]
        going = (~done).nonzero().squeeze(1)
        alive, state, ids = alive[going], state[going], token[going]
        tokens[alive, state] = ids
        log_pf[alive, state] = log_q[going, ids]
        state, at = state + 1, support.advance(at[going], ids)
        if len(alive) > 0:
            writer.append(going, ids)
    return Paths(tokens, lengths, stops, log_pf, log_pterm)


def _state_log_probs(
    logits: Tensor, state: Tensor, support: SupportLaw, legal: Tensor
) -> tuple[Tensor, Tensor]:
    """(log q [b, V] over tokens and stop symbols, log q(stop) [b]) at the states [b] of logits, legal [b, V]."""
    stop_ids = list(support.stop_ids)
    log_q = logits.float().masked_fill(~legal, -torch.inf).log_softmax(-1)
    log_stop = log_q[:, stop_ids].logsumexp(-1)
    return log_q, log_stop.masked_fill(state == support.max_tokens, 0.0)


def _inverse_cdf(log_q: Tensor, u: Tensor) -> Tensor:
    """[b] the first index whose cumulative probability exceeds u [b]: never one of probability 0."""
    cdf = log_q.double().exp().cumsum(-1)
    index = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return index.clamp(max=log_q.shape[-1] - 1)
