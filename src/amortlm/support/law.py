"""The law of a support: its legal next tokens, as data and pure functions of tensors. It uses no model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from amortlm.errors import ConfigError
from amortlm.support.automaton import Automaton
from amortlm.support.lists import Lists, split_statements
from amortlm.support.log_probs import Legal, SupportLogProbs
from amortlm.support.tools import BoundTool
from amortlm.types import Rollouts, Row


class Step(NamedTuple):
    """The next token or stop symbol at one state of each of b texts.

    legal     [b, V] bool: the legal tokens and stop symbols
    logits    [b, V] -inf where not legal
    log_q     [b, V] log-probabilities of tokens and stop symbols, nats
    log_stop  [b] log-probability of stopping with any symbol, nats; 0 if stopping is certain
    """

    legal: Tensor
    logits: Tensor
    log_q: Tensor
    log_stop: Tensor

    def merged(self, stop_ids: Sequence[int]) -> Tensor:
        """log_q with the probability of all stop symbols at the first of them, -inf at the others."""
        out = self.log_q.clone()
        out[:, list(stop_ids)] = -torch.inf
        out[:, stop_ids[0]] = self.log_stop
        return out


@dataclass(frozen=True)
class SupportLaw:
    """A support resolved for one tokenizer. Holds no model, and can be pickled.

    allowed [V] bool: the tokens that may occur inside a completion; with `lists`, inside a statement. With lists or a
    pattern, an automaton gives the legal tokens; if it looks ahead, the law is guided. In the methods, `node` is a node
    of the automaton, and t the number of tokens written. temperature: q is the softmax of logits / temperature on the
    legal tokens and stop symbols.
    """

    stop_ids: tuple[int, ...]
    min_tokens: int
    max_tokens: int
    allowed: Tensor
    tool: BoundTool | None = None
    lists: Lists | None = None
    patterns: tuple[str, ...] = ()
    automaton: Automaton | None = None
    temperature: float = 1.0

    @cached_property
    def symbols(self) -> Tensor:
        """[s] the stop symbols, where `allowed` is: an index that need not be sent to a GPU each time."""
        return torch.tensor(self.stop_ids, device=self.allowed.device)

    @property
    def last_state(self) -> int:
        """The last state at which there is something to draw: the stop at max_tokens is certain, and only its symbol
        is not, if there are several."""
        return self.max_tokens if len(self.stop_ids) > 1 else self.max_tokens - 1

    def to(self, device: torch.device) -> SupportLaw:
        """The same law with its tables on the device."""
        if self.allowed.device == device:
            return self
        automaton = None if self.automaton is None else self.automaton.to(device)
        return replace(self, allowed=self.allowed.to(device), automaton=automaton)

    @property
    def is_guided(self) -> bool:
        return self.automaton is not None and self.automaton.log_h is not None

    def guided(self, log_token: Tensor, log_stop: float) -> SupportLaw:
        """The same support with another law: q(token) is proportional to p(token) h(text so far, with the token).

        h is the chance that a text becomes a completion if tokens follow with chances exp(log_token) [V], and the end
        with exp(log_stop), whatever was written before. So what an automaton asks for is written where p invites it,
        not only where nothing else is legal any more. Without an automaton, the law itself. (As in Zhang et al. 2023,
        "Tractable control for autoregressive language generation", where a hidden Markov model gives h.)
        """
        if self.automaton is None:
            return self
        classes = self.automaton.step.shape[1]
        mass = torch.zeros(classes, dtype=torch.float64)
        mass.index_add_(0, self.automaton.token_class, log_token.double().exp())
        return replace(self, automaton=self.automaton.looking_ahead(mass.log(), log_stop))

    def tempered(self, temperature: float) -> SupportLaw:
        """The same support with the law at a softmax temperature, on top of its own. Raises ConfigError unless it is a
        finite number above 0."""
        if not 0 < temperature < math.inf:
            raise ConfigError(f"a temperature must be a finite number above 0, not {temperature}")
        return replace(self, temperature=self.temperature * temperature)

    def sharpened(self, factor: float) -> SupportLaw:
        """A guided law with h to the power of `factor`: drawn from at this temperature, p is tempered, and h is not."""
        assert self.automaton is not None
        return replace(self, automaton=self.automaton.sharpened(factor))

    def size(self) -> int:
        """Number of completions in the support (with a tool: an upper bound)."""
        if self.automaton is not None:
            return self.automaton.size
        n = int(self.allowed.sum())
        return sum(n**t for t in range(self.min_tokens, self.max_tokens + 1))

    def completions(self, length: int) -> Iterator[list[int]]:
        """Every completion of `length` tokens, in a fixed order."""
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
        """Can the policy write this completion? Tokens after a tool's trigger must be the tool's own output."""
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

    def nodes(self, tokens: Tensor) -> Tensor:
        """[B, T+1] the automaton's node after each prefix of tokens [B, T]; without an automaton 0 everywhere."""
        if self.automaton is None:
            return tokens.new_zeros(len(tokens), tokens.shape[1] + 1)
        return self.automaton.to(tokens.device).nodes(tokens)

    def advance(self, node: Tensor, token: Tensor) -> Tensor:
        """[b] the nodes after one more token [b] each."""
        return node if self.automaton is None else self.automaton.to(token.device).advance(node, token)

    def legal(self, t: Tensor, node: Tensor) -> Tensor:
        """[b, V] bool: the legal tokens and stop symbols after t [b] tokens at nodes [b]."""
        if self.automaton is None:
            legal = self.allowed.to(t.device) & (t < self.max_tokens)[:, None]
            ends = t >= self.min_tokens
        else:
            automaton = self.automaton.to(t.device)
            legal, ends = automaton.legal_tokens(t, node), automaton.ends[t, node]
        legal[:, self.symbols] = ends[:, None]
        return legal

    def step(self, logits: Tensor, t: Tensor, node: Tensor) -> Step:
        """q at one state of each of b texts: logits [b, V] after t [b] tokens at nodes [b], renormalised on the legal
        tokens and stop symbols."""
        legal = self.legal(t, node)
        precise = torch.promote_types(logits.dtype, torch.float32)
        logits = self._looking_ahead(self._tempered(logits.to(precise)), t, node).masked_fill(
            ~legal, -torch.inf
        )
        log_q = logits.log_softmax(-1)
        log_stop = log_q[:, self.symbols].logsumexp(-1)
        return Step(legal, logits, log_q, log_stop.masked_fill(t >= self.max_tokens, 0.0))

    def log_probs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log q of tokens [B, T], and of stopping at the S states of logits [B, S, V]; S is T, or T + 1 with the last
        state.

        Returns log_pf [B, T], -inf for a token that is never written, and log_pterm [B, S]; float32, nats,
        differentiable.
        """
        shape, logits = logits.shape[:2], self._tempered(logits)
        t = torch.arange(shape[1], device=logits.device).expand(shape)
        allowed, symbols = self.allowed.to(logits.device), torch.tensor(self.stop_ids, device=logits.device)
        if self.automaton is None:
            legal = Legal(allowed, symbols, t < self.max_tokens, t >= self.min_tokens)
        else:
            automaton, node = self.automaton.to(logits.device), self.nodes(tokens)[:, : shape[1]]
            raised = self._looking_ahead(logits.flatten(0, 1), t.flatten(), node.flatten())
            logits = raised.view(logits.shape)
            legal = Legal(
                allowed, symbols, automaton.goes[t, node], automaton.ends[t, node], automaton, t, node
            )
        after = torch.nn.functional.pad(tokens, (0, shape[1] - tokens.shape[1]))
        log_p, log_pterm = SupportLogProbs.apply(logits, after, legal)
        return log_p[:, : tokens.shape[1]], log_pterm

    def _tempered(self, logits: Tensor) -> Tensor:
        if self.temperature == 1:
            return logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature

    def _looking_ahead(self, logits: Tensor, t: Tensor, node: Tensor) -> Tensor:
        """Logits [b, V] after t [b] tokens at nodes [b], raised by what the automaton sees ahead."""
        if not self.is_guided:
            return logits
        assert self.automaton is not None
        token, stop = self.automaton.to(logits.device).ahead(t, node)
        token[:, self.symbols] = stop[:, None]
        return logits + token.float()

    def rollouts(
        self,
        rows: Sequence[Row],
        row_index: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        stops: Tensor | None = None,
    ) -> Rollouts:
        """Rollouts on this support; their masks are computed from the lengths (with an automaton, also from the
        tokens).

        row_index [B], tokens [B, T], lengths [B]; stops [B] (default: the first stop symbol).
        """
        states = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        if stops is None:
            stops = torch.full_like(lengths, self.stop_ids[0])
        stop_mask = (states <= lengths[:, None]) & (states >= self.min_tokens) & (states <= self.max_tokens)
        action_mask = states[:-1] < lengths[:, None]
        if self.automaton is not None:
            stop_mask &= self.automaton.to(tokens.device).ends[
                states.clamp(max=self.max_tokens), self.nodes(tokens)
            ]
        if self.tool is not None:
            forced = self._forced(tokens, lengths)
            action_mask = action_mask & ~forced
            # A completion cannot stop where the next token is forced, except for the certain stop at max_tokens.
            stop_mask = stop_mask & ~torch.nn.functional.pad(forced, (0, 1))
        separator = None if self.lists is None else self.lists.separator
        return Rollouts(
            rows, row_index, tokens, lengths, stops, stop_mask, action_mask, self.stop_ids, separator
        )

    def _forced(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] True at the tokens that the tool wrote."""
        assert self.tool is not None
        out = torch.zeros(tokens.shape, dtype=torch.bool)
        called = self.tool.may_trigger[tokens.cpu()].any(1).tolist()
        for i, (row, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            if called[i]:
                out[i, :n] = torch.tensor(self.tool.forced(row[:n]) or [False] * n, dtype=torch.bool)
        return out.to(tokens.device)
