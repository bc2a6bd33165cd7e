"""The law of a support, without a model: what may be written after what, as data and pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from amortlm.support.automaton import Automaton
from amortlm.support.lists import Lists, split_statements
from amortlm.support.log_probs import Legal, SupportLogProbs
from amortlm.support.tools import BoundTool
from amortlm.types import Rollouts, Row


@dataclass(frozen=True)
class SupportLaw:
    """A support resolved for one model.

    allowed [V] bool: what may be written inside a completion; with `lists`, inside a statement. With lists or a
    pattern an automaton says which tokens may follow which.
    """

    stop_ids: tuple[int, ...]
    min_tokens: int
    max_tokens: int
    allowed: Tensor
    tool: BoundTool | None = None
    lists: Lists | None = None
    pattern: str | None = None
    automaton: Automaton | None = None

    def size(self) -> int:
        """Number of completions in the support (with a tool: at most so many)."""
        if self.automaton is not None:
            return self.automaton.size
        n = int(self.allowed.sum())
        return sum(n**t for t in range(self.min_tokens, self.max_tokens + 1))

    def completions(self, length: int) -> Iterator[list[int]]:
        """Every completion of so many tokens, in a fixed order."""
        if self.automaton is not None:
            yield from self.automaton.completions(length)
            return
        choices = self.allowed.nonzero().squeeze(1).tolist()
        if self.tool is None:
            yield from map(list, product(choices, repeat=length))
            return
        partial: list[tuple[list[int], list[int]]] = [([], [])]
        while partial:
            tokens, pending = partial.pop()
            if len(tokens) == length:
                if not pending or length == self.max_tokens:
                    yield tokens
            elif pending:
                partial.append(([*tokens, pending[0]], pending[1:]))
            else:
                longer = [[*tokens, choice] for choice in reversed(choices)]
                partial += [(z, self.tool.result(z)) for z in longer]

    def contains(self, tokens: Sequence[int]) -> bool:
        """Can the policy write this completion? With a tool, its tokens must be what it writes."""
        known = all(0 <= t < len(self.allowed) for t in tokens)
        if not known or not self.min_tokens <= len(tokens) <= self.max_tokens:
            return False
        if self.automaton is not None:
            return self.automaton.contains(tokens)
        if self.tool is None:
            return bool(self.allowed[list(tokens)].all())
        forced = self.tool.forced(tokens)
        if forced is None or (len(tokens) < self.max_tokens and self.tool.inside(tokens)):
            return False
        return all(f or bool(self.allowed[t]) for f, t in zip(forced, tokens, strict=True))

    def statements(self, tokens: Sequence[int]) -> list[list[int]]:
        """The statements of a completion, without their separators; without a separator, the completion."""
        return [list(tokens)] if self.lists is None else split_statements(tokens, self.lists.separator)

    def positions(self, tokens: Tensor) -> Tensor:
        """[B, T+1] where the automaton is after each prefix of tokens [B, T]; without one, 0 everywhere."""
        if self.automaton is None:
            return tokens.new_zeros(len(tokens), tokens.shape[1] + 1)
        return self.automaton.to(tokens.device).states(tokens)

    def advance(self, position: Tensor, token: Tensor) -> Tensor:
        """[b] the positions after one token more."""
        return (
            position if self.automaton is None else self.automaton.to(token.device).advance(position, token)
        )

    def legal(self, state: int | Tensor, position: Tensor) -> Tensor:
        """What may come next, stop symbols included, after `state` tokens (an int or [b]) at `position` [b].

        Returns bool [b, V], or [V] where it is the same for all.
        """
        state, stop_ids = torch.as_tensor(state, device=position.device), list(self.stop_ids)
        if self.automaton is None:
            legal = self.allowed.to(position.device) & (state < self.max_tokens)[..., None]
            legal[..., stop_ids] = (state >= self.min_tokens)[..., None]
            return legal
        automaton, state = self.automaton.to(position.device), state.expand(len(position))
        legal = automaton.legal_tokens(state, position)
        legal[:, stop_ids] = automaton.ends[state, position][:, None]
        return legal

    def log_probs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log q of tokens [B, T] and of stopping at the S states (T, or T + 1 with the last) of logits [B, S, V]:

        log_pf [B, T], -inf for a token that is never written, log_pterm [B, S]; float32, differentiable.
        """
        shape = logits.shape[:2]
        state = torch.arange(shape[1], device=logits.device).expand(shape)
        allowed, symbols = self.allowed.to(logits.device), torch.tensor(self.stop_ids, device=logits.device)
        if self.automaton is None:
            legal = Legal(allowed, symbols, state < self.max_tokens, state >= self.min_tokens)
        else:
            automaton, position = self.automaton.to(logits.device), self.positions(tokens)[:, : shape[1]]
            goes, ends = automaton.goes[state, position], automaton.ends[state, position]
            legal = Legal(allowed, symbols, goes, ends, automaton, state, position)
        after = torch.nn.functional.pad(tokens, (0, shape[1] - tokens.shape[1]))
        log_p, log_pterm = SupportLogProbs.apply(logits, after, legal)
        return log_p[:, : tokens.shape[1]], log_pterm

    def rollouts(
        self,
        rows: Sequence[Row],
        row_index: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        stops: Tensor | None = None,
    ) -> Rollouts:
        """Rollouts on this support: masks follow from the lengths (with an automaton, from the tokens too)."""
        states = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        if stops is None:
            stops = torch.full_like(lengths, self.stop_ids[0])
        stop_mask = (states <= lengths[:, None]) & (states >= self.min_tokens) & (states <= self.max_tokens)
        action_mask = states[:-1] < lengths[:, None]
        if self.automaton is not None:
            stop_mask &= self.automaton.to(tokens.device).ends[
                states.clamp(max=self.max_tokens), self.positions(tokens)
            ]
        if self.tool is not None:
            forced = self._forced(tokens, lengths)
            action_mask = action_mask & ~forced
            # A completion cannot stop where the next token is forced, but for the sure stop at max_tokens.
            stop_mask = stop_mask & ~torch.nn.functional.pad(forced, (0, 1))
        return Rollouts(rows, row_index, tokens, lengths, stops, stop_mask, action_mask, self.stop_ids)

    def _forced(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] True at the tokens that the tool wrote."""
        assert self.tool is not None
        out = torch.zeros(tokens.shape, dtype=torch.bool)
        called = self.tool.may_trigger[tokens.cpu()].any(1).tolist()
        for i, (row, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            if called[i]:
                out[i, :n] = torch.tensor(self.tool.forced(row[:n]) or [False] * n, dtype=torch.bool)
        return out.to(tokens.device)
