"""Automata over tokens: supports whose legal next tokens depend on the text so far (lists, patterns)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class Automaton:
    """Completions of min_tokens to max_tokens tokens that lead from node 0 of S nodes to an accepting node.

    step [S, C]      the node after a token of class c; S, the dead end, if there is none
    token_class [V]  in 0..C-1; tokens of one class lead to the same nodes (tokens that are never written: to the dead
                     end)
    accepts [S]      bool: may a completion end at the node

    A token is legal at a node only if some completion continues with it, so every legal prefix can be finished.
    log_h [T+2, S+1]: with look-ahead, log of the chance that a text becomes a completion, in nats, after 0..T+1 tokens
    at each node; 0 where it cannot (`looking_ahead`).
    """

    log_h: Tensor | None = None

    def __init__(self, step: Tensor, token_class: Tensor, accepts: Tensor, min_tokens: int, max_tokens: int):
        size, classes = step.shape
        self.token_class, self.min_tokens, self.max_tokens = token_class, min_tokens, max_tokens
        self.step = torch.cat([step, torch.full((1, classes), size)])
        # reach[k, s]: do some k tokens lead from s to an accepting node?
        reach, after = np.zeros((max_tokens + 1, size + 1), dtype=bool), self.step.numpy()
        reach[0, :-1] = accepts
        for k in range(max_tokens):
            reach[k + 1] = reach[k].take(after).any(1)  # for large tables five times as fast as in torch
        self.reach = torch.from_numpy(reach)
        # After t tokens at node s: can[t, s], can the text become a completion; goes[t, s], by writing more tokens;
        # ends[t, s], by stopping now.
        self.can = torch.stack([self._within(t, 0) for t in range(max_tokens + 2)])
        self.goes = torch.stack([self._within(t, 1) for t in range(max_tokens + 1)])
        # If nothing can follow (also in the padding beyond the end), stopping is possible: otherwise q would not sum
        # to one.
        self.ends = self.reach[0] & (torch.arange(max_tokens + 1)[:, None] >= min_tokens) | ~self.goes
        self._on: dict[torch.device, Automaton] = {}

    def _within(self, t: int, least: int) -> Tensor:
        """[S+1] bool: after t tokens, do `least` or more tokens lead to an accepting node in time?"""
        return self.reach[max(least, self.min_tokens - t) : self.max_tokens - t + 1].any(0)

    def to(self, device: torch.device) -> Automaton:
        """The same automaton with its tables on the device; they are copied once."""
        if device == self.step.device:
            return self
        if device not in self._on:
            self._on[device] = copy.copy(self)
            tables = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
            vars(self._on[device]).update(tables)
        return self._on[device]

    def advance(self, node: Tensor, token: Tensor) -> Tensor:
        """The nodes [b] after nodes [b] and one more token [b] each, whether or not the token is legal."""
        return self.step[node, self.token_class[token]]

    def nodes(self, tokens: Tensor) -> Tensor:
        """[B, T+1] the nodes after every prefix of tokens [B, T]."""
        out = [tokens.new_zeros(len(tokens))]
        for token in self.token_class[tokens].unbind(1):
            out.append(self.step[out[-1], token])
        return torch.stack(out, 1)

    def looking_ahead(self, log_token: Tensor, log_stop: float) -> Automaton:
        """The same automaton with `log_h`, for texts each of whose tokens is of class c with chance exp(log_token[c])
        [C], and which end with chance exp(log_stop), whatever was written before."""
        log_h = torch.full((self.max_tokens + 2, len(self.step)), -torch.inf, dtype=torch.float64)
        ends = self.reach[0] & (torch.arange(self.max_tokens + 1)[:, None] >= self.min_tokens)
        for t in range(self.max_tokens, -1, -1):
            if t < self.max_tokens:
                log_h[t] = (log_token.double() + log_h[t + 1, self.step]).logsumexp(1)
            log_h[t] = torch.logaddexp(log_h[t], torch.where(ends[t], log_stop, -torch.inf))
        return self._with(log_h.masked_fill(log_h.isneginf(), 0.0))

    def sharpened(self, factor: float) -> Automaton:
        """The same automaton with h to the power of `factor`."""
        assert self.log_h is not None
        return self._with(factor * self.log_h)

    def _with(self, log_h: Tensor) -> Automaton:
        found = copy.copy(self)
        found.log_h, found._on = log_h, {}
        return found

    def ahead(self, t: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """How much likelier a text becomes a completion by a token, [n, V], or by ending, [n], after t [n] tokens at
        nodes [n]: the change of `log_h`, which is 0 after the end. Nats; of no meaning where they are not legal."""
        assert self.log_h is not None
        before = self.log_h[t, node]
        after = self.log_h[t[:, None] + 1, self.step[node]]
        return (after - before[:, None])[:, self.token_class], -before

    def legal_tokens(self, t: Tensor, node: Tensor) -> Tensor:
        """[n, V] bool: the tokens that are legal at nodes [n] after t [n] tokens."""
        return self.can[t[:, None] + 1, self.step[node]][:, self.token_class]

    def contains(self, tokens: Sequence[int]) -> bool:
        """Does the automaton accept these tokens? They must be in the vocabulary, and min_tokens to max_tokens many."""
        return bool(self.reach[0, self._after(tokens)])

    def has_prefix(self, tokens: Sequence[int]) -> bool:
        """Does some completion begin with these tokens?"""
        return bool(self.can[len(tokens), self._after(tokens)])

    def _after(self, tokens: Sequence[int]) -> Tensor:
        return self.nodes(torch.tensor([tokens], dtype=torch.long, device=self.step.device))[0, -1]

    @cached_property
    def size(self) -> int:
        """Number of completions."""
        tokens = torch.bincount(self.token_class, minlength=self.step.shape[1]).tolist()
        moves: list[Counter[int]] = []
        for row in self.step.tolist():
            moves.append(Counter())
            for node, n in zip(row, tokens, strict=True):
                moves[-1][node] += n
        ways, total = self.reach[0].int().tolist(), 0
        for length in range(len(self.reach)):
            total += ways[0] if length >= self.min_tokens else 0
            ways = [sum(n * ways[node] for node, n in move.items() if ways[node]) for move in moves]
        return total

    def completions(self, length: int) -> Iterator[list[int]]:
        """Every completion of `length` tokens, in the order of their ids."""
        choices: dict[tuple[int, int], list[int]] = {}
        partial: list[tuple[list[int], int]] = [([], 0)] if self.reach[length, 0] else []
        while partial:
            tokens, node = partial.pop()
            left = length - len(tokens)
            if left == 0:
                yield tokens
                continue
            if (node, left) not in choices:
                legal = self.reach[left - 1][self.step[node]][self.token_class]
                choices[node, left] = legal.nonzero().squeeze(1).tolist()[::-1]
            classes = self.token_class[choices[node, left]]
            after = self.step[node, classes].tolist()
            partial += [([*tokens, token], s) for token, s in zip(choices[node, left], after, strict=True)]
