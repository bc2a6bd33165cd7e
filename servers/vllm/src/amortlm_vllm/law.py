"""The law of a support as tables, and draws on it: pure functions of tensors. It knows neither vLLM nor amortlm.

It does what `amortlm.support.law` and `amortlm.engine.decoding` do; amortlm's tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

AT_ONCE = 2**26  # logits that a draw works on at a time: it makes some copies of them


class Drawn(NamedTuple):
    """The next token or stop symbol of each of b texts.

    token     [b]
    log_q     [b] its log q, nats, without exploration
    log_stop  [b] log q of stopping with any symbol, nats, without exploration; 0 if stopping is certain
    """

    token: Tensor
    log_q: Tensor
    log_stop: Tensor


@dataclass(frozen=True)
class Law:
    """The tables of a support. `t` is the number of tokens written, `node` a node of its automaton (0 without one).

    allowed [V]           bool: tokens that may be written; with an automaton its tables say so
    step [S+1, C]         the node after a token of each class; S is the dead end
    token_class [V]       the class of each token
    can [T+2, S+1]        bool: after t tokens, can a text at the node become a completion?
    ends [T+1, S+1]       bool: may it stop?
    """

    stop_ids: tuple[int, ...]
    min_tokens: int
    max_tokens: int
    allowed: Tensor
    step: Tensor | None = None
    token_class: Tensor | None = None
    can: Tensor | None = None
    ends: Tensor | None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> Law:
        """Read what amortlm wrote (safetensors). Raises ValueError if it is not the tables of a support."""
        try:
            tables = load(data)
            stop_ids, lengths = tables.pop("stop_ids").tolist(), tables.pop("lengths").tolist()
            law = cls(tuple(stop_ids), *lengths, **tables)
        except (SafetensorError, KeyError, TypeError) as e:
            raise ValueError(f"these are not the tables of a support: {e}") from e
        law._check()
        return law

    def _check(self) -> None:
        """Raise ValueError for tables that would index out of range."""
        size, tables = len(self.allowed), (self.step, self.token_class, self.can, self.ends)
        fits = self.allowed.dtype == torch.bool and self.allowed.dim() == 1 and bool(self.stop_ids)
        fits &= 0 <= self.min_tokens <= self.max_tokens and all(0 <= s < size for s in self.stop_ids)
        if any(x is not None for x in tables):
            fits = fits and all(x is not None for x in tables) and self._fits()
        if not fits:
            raise ValueError("these are not the tables of a support: they do not fit together")

    def _fits(self) -> bool:
        nodes, classes = self.step.shape
        shapes = (tuple(self.can.shape), tuple(self.ends.shape), len(self.token_class))
        if shapes != ((self.max_tokens + 2, nodes), (self.max_tokens + 1, nodes), len(self.allowed)):
            return False
        ranges = ((self.step, nodes), (self.token_class, classes))
        return all(bool(((x >= 0) & (x < end)).all()) for x, end in ranges)

    def to(self, device: torch.device | str) -> Law:
        """The same with its tables on the device."""
        moved: dict[str, Any] = {
            k: x.to(device) if isinstance(x, Tensor) else x for k, x in vars(self).items()
        }
        return Law(**moved)

    def after(self, node: int, tokens: Sequence[int]) -> int:
        """The node after these tokens, from `node`."""
        if self.step is None or self.token_class is None:
            return 0
        for token in tokens:
            node = int(self.step[node, self.token_class[token]])
        return node

    def legal(self, t: Tensor, node: Tensor) -> Tensor:
        """[b, V] bool: the legal tokens and stop symbols after t [b] tokens at nodes [b]."""
        if self.step is None:
            legal = self.allowed & (t < self.max_tokens)[:, None]
            ends = t >= self.min_tokens
        else:
            legal = self.can[t[:, None] + 1, self.step[node]][:, self.token_class]
            ends = self.ends[t, node]
        legal[:, list(self.stop_ids)] = ends[:, None]
        return legal


def draw(
    law: Law, logits: Tensor, t: Tensor, node: Tensor, u: Tensor, heat: Tensor, epsilon: Tensor
) -> Drawn:
    """The next token or stop symbol of b texts, after t [b] tokens at nodes [b].

    logits [b, V]; u [b] uniform numbers in [0, 1); heat [b] temperatures (0: greedy), epsilon [b] shares of uniform
    tokens, which change what is drawn, not its log q. The same texts and numbers give the same tokens.
    """
    size = max(1, AT_ONCE // logits.shape[1])
    columns = (x.split(size) for x in (logits, t, node, u, heat, epsilon))
    parts = [_draw(law, *rows) for rows in zip(*columns, strict=True)]
    return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _draw(
    law: Law, logits: Tensor, t: Tensor, node: Tensor, u: Tensor, heat: Tensor, epsilon: Tensor
) -> Drawn:
    legal = law.legal(t, node)
    logits = logits.float().masked_fill(~legal, -torch.inf)
    log_q = logits.log_softmax(-1)
    log_stop = log_q[:, list(law.stop_ids)].logsumexp(-1).masked_fill(t >= law.max_tokens, 0.0)
    uniform = legal / legal.sum(-1, keepdim=True)
    share = epsilon[:, None]
    token = _inverse_cdf((1 - share) * _tempered(logits, heat).exp() + share * uniform, u)
    return Drawn(token, log_q.gather(1, token[:, None]).squeeze(1), log_stop)


def _tempered(logits: Tensor, heat: Tensor) -> Tensor:
    """[b, V] log-probabilities at temperatures heat [b]; at 0, the first of the likeliest tokens."""
    heat = heat[:, None]
    # Relative to the likeliest token, so that no temperature overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat
    greedy = torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    return torch.where(heat > 0, scaled, greedy).log_softmax(-1)


def _inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """[b] the first token whose cumulative probability exceeds u [b]: never one of probability 0."""
    cdf = probabilities.double().cumsum_(-1)
    token = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=probabilities.shape[-1] - 1)


def as_logits(drawn: Drawn, stop_ids: Sequence[int], size: int) -> Tensor:
    """[b, size] logits whose likeliest token is the one drawn, and which carry its log q and log q(stop).

    vLLM takes the likeliest token of a greedy request, and reports the logits of the two likeliest with it
    (`from_logits`). So the figures need no way of their own out of its processes, and no record that would have to
    follow requests that it moves, interrupts, begins again or computes on several devices: each step is a function of
    the text so far. Both logits are the float32 numbers themselves, so nothing is lost.
    """
    out = drawn.log_q.new_full((len(drawn.token), size), -torch.inf)
    # Below the token's: log q(stop) is at most 0, and only if the token is a stop, whose own log q nobody asks for.
    is_stop = torch.isin(drawn.token, torch.tensor(stop_ids, device=drawn.token.device))
    own = torch.where(is_stop, 1.0, -drawn.log_q)
    out.scatter_(1, ((drawn.token + 1) % size)[:, None], drawn.log_stop[:, None])
    return out.scatter_(1, drawn.token[:, None], own[:, None])


def from_logits(token: int, logits: Mapping[int, float]) -> tuple[float, float]:
    """(log q of the token, without meaning for a stop; log q(stop)) from the logits of the two likeliest tokens."""
    return -logits[token], max((x for other, x in logits.items() if other != token), default=-math.inf)
