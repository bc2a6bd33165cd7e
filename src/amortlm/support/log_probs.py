"""log q of tokens and of stopping from logits [B, S, V], renormalised on a support.

The gradient is written by hand, to save memory: in autograd every masked copy, its softmax and their gradients are as
large as the logits, in float32. Here only the logits are kept, and one gradient tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amortlm.support.automaton import Automaton

# Number of logits converted to float32 at a time: on a CPU they fit into the cache; on a GPU few kernels matter more.
CPU_CHUNK, GPU_CHUNK = 2**19, 2**26


class Legal(NamedTuple):
    """The legal tokens and stops at the S states of B completions.

    allowed    [V] bool: tokens that may occur in a completion
    stop_ids   [s] long: the stop symbols
    go, stop   [B, S] bool: may a token be written, may the completion stop
    automaton, and t, node [B, S]: if the legal tokens depend on the text so far; else None
    """

    allowed: Tensor
    stop_ids: Tensor
    go: Tensor
    stop: Tensor
    automaton: Automaton | None = None
    t: Tensor | None = None
    node: Tensor | None = None

    def written(self, rows: slice) -> Tensor:
        """[n, V] (or [1, V]): tokens that may be written at these states (flattened over B and S)."""
        if self.automaton is None or self.t is None or self.node is None:
            return self.allowed[None]
        return self.automaton.legal_tokens(self.t.flatten()[rows], self.node.flatten()[rows])


class SupportLogProbs(torch.autograd.Function):
    """(logits [B, S, V], tokens [B, S], legal) -> log_p [B, S] of the token after each state, log_stop [B, S]; float32.

    log_p is -inf for a token that is never written, log_stop is -inf where stopping is impossible.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, legal: Legal) -> tuple[Tensor, Tensor]:
        log_norm, log_end, log_p = (logits.new_empty(tokens.numel(), dtype=torch.float32) for _ in range(3))
        for rows, x in _chunks(logits):
            written = legal.written(rows)
            ends = x[:, legal.stop_ids].logsumexp(-1)
            log_end[rows] = ends.masked_fill(~legal.stop.flatten()[rows], -torch.inf)
            x = x.masked_fill(~written, -torch.inf)
            log_go = x.logsumexp(-1).masked_fill(~legal.go.flatten()[rows], -torch.inf)
            log_norm[rows] = torch.logaddexp(log_go, log_end[rows])
            log_p[rows] = x.gather(1, tokens.flatten()[rows, None]).squeeze(1)
        ctx.save_for_backward(logits, tokens, log_norm, log_end)
        ctx.legal = legal
        return (log_p - log_norm).view_as(tokens), (log_end - log_norm).view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_p: Tensor, grad_log_stop: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, log_norm, log_end = ctx.saved_tensors
        legal, shape = ctx.legal, logits.shape
        out = torch.empty_like(logits)
        flat = out.view(-1, shape[-1])
        to_token, to_stop = grad_log_p.flatten(), grad_log_stop.flatten()
        for rows, x in _chunks(logits):
            written = legal.written(rows) & legal.go.flatten()[rows, None]
            stop = legal.stop.flatten()[rows, None]
            norm, end = log_norm[rows, None], log_end[rows, None]
            both = (to_token[rows] + to_stop[rows])[:, None]
            ends = x[:, legal.stop_ids]
            # d log_norm: the probabilities of all legal tokens and symbols. d log_end: those of the symbols given a
            # stop.
            stops = (ends - end).exp() * to_stop[rows, None] - (ends - norm).exp() * both
            picked = tokens.flatten()[rows, None]
            direct = to_token[rows, None].masked_fill(~written.expand(len(x), -1).gather(1, picked), 0.0)
            grad = (x - norm).exp_().masked_fill_(~written, 0.0).mul_(-both)
            grad.scatter_add_(1, picked, direct)
            grad[:, legal.stop_ids] = stops.masked_fill(~stop, 0.0)
            flat[rows] = grad.to(flat.dtype)
        return out, None, None


def at_once(device: torch.device, width: int) -> int:
    """How many rows of `width` numbers to work on at a time where copies are made of them; at least one."""
    return max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(1, width))


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which states, their logits as float32 [n, V]), a few states at a time."""
    flat = logits.view(-1, logits.shape[-1]) if logits.is_contiguous() else logits.flatten(0, 1)
    size = at_once(flat.device, flat.shape[1])
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        yield rows, flat[rows].float()
