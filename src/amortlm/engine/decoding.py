"""Left-to-right sampling on a support, without gradient.

Every trajectory consumes its own stream of uniform numbers (inverse-CDF sampling), so what is drawn for a
prompt does not depend on which other prompts share the batch, on padding or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.engine.passes import Passes, Prefix
from amortlm.errors import ConfigError
from amortlm.support import SupportLaw
from amortlm.support.tools import ToolRun


@dataclass(frozen=True)
class Exploration:
    """How the behaviour departs from the policy: softmax temperature [B] and a share of uniform choices. At temperature
    0 it takes the likeliest token. Raises ConfigError for temperatures below 0 or infinite, epsilon outside [0, 1]."""

    temperature: Tensor | None = None
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        heat = self.temperature
        if heat is not None and not bool((torch.isfinite(heat) & (heat >= 0)).all()):
            raise ConfigError(
                f"a temperature must be a finite number, 0 (greedy) or above, not {heat.tolist()}"
            )
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"epsilon is a share of uniform choices, between 0 and 1, not {self.epsilon}")


@dataclass(frozen=True)
class Drawn:
    """Sampled trajectories: tokens [B, T], lengths [B], stops [B], and log q under the policy itself:
    log_pf [B, T], log_pterm [B, T+1] (0 / -inf where never reached)."""

    tokens: Tensor
    lengths: Tensor
    stops: Tensor
    log_pf: Tensor
    log_pterm: Tensor


def uniform_streams(keys: Sequence[object], counts: Sequence[int], length: int) -> Tensor:
    """[sum of counts, length] uniforms in [0, 1): a generator per key (any printable value)."""
    out = []
    for key, count in zip(keys, counts, strict=True):
        generator = torch.Generator().manual_seed(seed_of(key))
        out.append(torch.rand(count, length, generator=generator))
    return torch.cat(out)


def seed_of(key: object) -> int:
    """A seed from any printable value, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


@torch.no_grad()
def draw(
    passes: Passes,
    prefix: Prefix,
    index: Tensor,
    support: SupportLaw,
    uniforms: Tensor,
    exploration: Exploration | None = None,
) -> Drawn:
    """Draw one completion for each entry of `index` [B] (its prompt). uniforms [B, max_tokens + 1].

    The model sees each distinct prefix of a prompt once, however many completions share it; those that have stopped
    leave the batch.
    """
    exploration = exploration or Exploration()
    batch, width, device = len(index), support.max_tokens, index.device
    tokens = torch.zeros(batch, width, dtype=torch.long, device=device)
    lengths = torch.full((batch,), width, device=device)
    stops = torch.full((batch,), support.stop_ids[0], device=device)
    log_pf = torch.zeros(batch, width, device=device)
    log_pterm = torch.full((batch, width + 1), -torch.inf, device=device)

    tools = ToolRun(support.tool, batch) if support.tool is not None else None
    position = torch.zeros_like(lengths)
    alive = torch.arange(batch, device=device)
    # Distinct prefixes are nodes: node [b] that of each completion alive.
    parent, node = index.unique(return_inverse=True)
    writer = passes.write(prefix, parent)
    # The stop at max_tokens is sure; only which symbol it is can take a pass to say.
    last = width if len(support.stop_ids) > 1 else width - 1
    for t in range(last + 1):
        logits = writer.logits()
        step = _step(logits[node], t, support, uniforms[alive, t], exploration, position[alive], alive)
        if tools is not None and t < width:
            step = step.forced(tools.forced(alive))
        log_pterm[alive, t] = step.log_stop
        done = step.stopped
        lengths[alive[done]], stops[alive[done]] = t, step.token[done]
        alive, going = alive[~done], ~done
        if len(alive) == 0:
            break
        chosen = step.token[going]
        tokens[alive, t], log_pf[alive, t] = chosen, step.log_p[going]
        position[alive] = support.advance(position[alive], chosen)
        if tools is not None:
            tools.advance(alive, tokens, t)
        if t == last:
            break
        nodes, node = (node[going] * logits.shape[1] + chosen).unique(return_inverse=True)
        writer.append(nodes // logits.shape[1], nodes % logits.shape[1])
    log_pterm[alive, width] = 0.0
    longest = max(int(lengths.max()), 1)
    return Drawn(tokens[:, :longest], lengths, stops, log_pf[:, :longest], log_pterm[:, : longest + 1])


@dataclass(frozen=True)
class _Step:
    token: Tensor  # [b] the token drawn: a stop symbol where stopped
    stopped: Tensor  # [b] bool
    log_p: Tensor  # [b] log q(token) under the policy
    log_stop: Tensor  # [b] log q(stop) under the policy

    def forced(self, token: Tensor) -> _Step:
        """The step with what a tool writes (token [b]; -1: nothing) in place of what was drawn."""
        theirs = token >= 0
        return _Step(
            torch.where(theirs, token, self.token),
            self.stopped & ~theirs,
            self.log_p.masked_fill(theirs, 0.0),
            self.log_stop.masked_fill(theirs, -torch.inf),
        )


def _step(
    logits: Tensor,
    t: int,
    support: SupportLaw,
    u: Tensor,
    exploration: Exploration,
    position: Tensor,
    alive: Tensor,
) -> _Step:
    """Draw the next token (or the stop) at state t for the b rows still alive. logits [b, V], position [b]."""
    stop_ids = torch.tensor(support.stop_ids, device=logits.device)
    legal = support.legal(t, position)
    logits = logits.float().masked_fill(~legal, -torch.inf)
    log_q = logits.log_softmax(-1)
    behaviour = log_q
    if exploration.temperature is not None:
        heat = exploration.temperature[alive, None].to(logits.dtype)
        # Relative to the likeliest token, so that no temperature overflows; the first of equals at temperature 0.
        scaled = (logits - logits.amax(-1, keepdim=True)) / heat
        greedy = torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        behaviour = torch.where(heat > 0, scaled, greedy).log_softmax(-1)
    probs = behaviour.exp()
    if exploration.epsilon > 0:
        probs = (1 - exploration.epsilon) * probs + exploration.epsilon * legal / legal.sum(-1, keepdim=True)
    cdf = probs.double().cumsum(-1)
    # The first index whose cdf exceeds u: never a token of probability 0.
    token = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True).squeeze(1)
    token = token.clamp(max=logits.shape[-1] - 1)
    log_stop = log_q[:, stop_ids].logsumexp(-1)
    if t >= support.max_tokens:
        log_stop = torch.zeros_like(log_stop)
    return _Step(token, torch.isin(token, stop_ids), log_q.gather(1, token[:, None]).squeeze(1), log_stop)
