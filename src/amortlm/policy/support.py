"""The support: which completions a policy can produce at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.errors import SupportError
from amortlm.policy.automaton import Automaton
from amortlm.policy.lists import Lists
from amortlm.policy.log_probs import Legal, SupportLogProbs
from amortlm.policy.patterns import pattern_automaton
from amortlm.policy.tools import BoundTool, Tool, tool_from_spec
from amortlm.targets.lists import split_statements
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

Tokens = Sequence[str | int] | None
MOST = 1_000_000  # tokens


@dataclass(frozen=True)
class Support:
    """Completions of min_tokens to max_tokens allowed tokens, ended by a stop token.

    stop             one token or several (text or id); not part of the completion
    min_tokens       stopping is impossible before so many tokens
    max_tokens       stopping is sure after so many tokens
    allowed_tokens   only these may be written (default: all but special tokens and tokens without text)
    banned_tokens    never written; wins over allowed_tokens
    tool             writes into the completion, whatever is allowed: a `Tool`, "calculator", or a JSON form
    separator        with it, a completion is a list of statements: "s1 SEP s2 SEP s3", none of them empty
    min_statements   stopping is impossible before so many statements
    max_statements   no separator after so many statements (default: as many as fit); equal to min_statements for
                     latents in sequence, "{z1}{z2}" in a target
    pattern          the whole text, outer white space removed, matches this regular expression: what
                     `constraint.matches` takes. SupportError, on binding, for one that is not regular or too large

    Stop tokens are never written inside a completion, special tokens only if allowed_tokens names them; then the text
    that constraints and verifiers read shows them. The separator is one token, allowed whatever allowed_tokens says,
    and counts as a token of the completion.
    """

    stop: str | int | Sequence[str | int]
    min_tokens: int = 1
    max_tokens: int = 25
    allowed_tokens: Tokens = None
    banned_tokens: Tokens = None
    tool: Tool | str | Mapping[str, Any] | None = None
    separator: str | int | None = None
    min_statements: int = 1
    max_statements: int | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SupportError(
                f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens} allows nothing; "
                "need 0 <= min_tokens <= max_tokens and max_tokens >= 1"
            )
        low, high = self.min_statements, self.max_statements
        if self.separator is None:
            if (low, high) != (1, None):
                raise SupportError(
                    "min_statements and max_statements count what a separator divides: give separator="
                )
        elif self.tool is not None:
            raise SupportError("a tool cannot write into a list of statements: take out separator or tool")
        elif not 1 <= low <= (low if high is None else high) or 2 * low - 1 > self.max_tokens:
            raise SupportError(
                f"min_statements={low}, max_statements={high}, max_tokens={self.max_tokens} allows nothing; need "
                "1 <= min_statements <= max_statements, and max_tokens >= 2 * min_statements - 1 for a token each "
                "and the separators"
            )
        if self.pattern is not None and (self.tool is not None or self.separator is not None):
            raise SupportError(
                "a pattern decides about every token of a completion: take out tool or separator (a pattern can spell "
                "what divides statements), or put constraint.matches(pattern) into the target"
            )

    def _check_types(self) -> None:
        """Raise SupportError for what is neither text nor number where one is due (True is no token)."""
        for name in ("min_tokens", "max_tokens", "min_statements", "max_statements"):
            value = getattr(self, name)
            if not (_is_int(value) or (value is None and name == "max_statements")):
                raise SupportError(f"{name} must be a whole number, got {value!r}")
            if value is not None and value > MOST:
                raise SupportError(f"{name}={value} is more than any model reads; at most {MOST:,}")
        for name in ("stop", "separator", "allowed_tokens", "banned_tokens"):
            value = getattr(self, name)
            if value is None and name != "stop":
                continue
            many = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
            one = name in ("stop", "separator") and _is_token(value)
            if not one and not (name != "separator" and many and all(map(_is_token, value))):
                kind = "a token, as text or id" if name in ("stop", "separator") else "a list of tokens"
                quotes = "; in YAML, write words such as no in quotes" if isinstance(value, bool) else ""
                raise SupportError(f"{name} must be {kind}, got {value!r}{quotes}")
        if self.pattern is not None and not isinstance(self.pattern, str):
            raise SupportError(f"pattern must be text, got {self.pattern!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form. Raises ConfigError for a tool that cannot be saved by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tool"] = None if self.tool is None else tool_from_spec(self.tool).to_spec()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def bind(self, lm: LanguageModel) -> BoundSupport:
        """Resolve tokens for a model. Raises SupportError if a token is unknown, if nothing is allowed, or
        if max_tokens are more than its context, whatever the prompt."""
        if lm.context is not None and self.max_tokens > lm.context:
            raise SupportError(
                f"max_tokens={self.max_tokens}, but {lm.name} has a context of {lm.context}; lower max_tokens"
            )
        stops = [self.stop] if isinstance(self.stop, str | int) else list(self.stop)
        if not stops:
            raise SupportError("support has no stop token; name at least one")
        stop_ids = tuple(dict.fromkeys(lm.token_id(s) for s in stops))
        allowed = torch.zeros(lm.vocab_size, dtype=torch.bool)
        if self.allowed_tokens is None:
            allowed[: len(lm.tokenizer)] = True
            allowed[sorted(i for i in lm.special_ids if i < lm.vocab_size)] = False
        else:
            allowed[[lm.token_id(t) for t in self.allowed_tokens]] = True
        allowed[[lm.token_id(t) for t in self.banned_tokens or []]] = False
        allowed[list(stop_ids)] = False
        lists = None if self.separator is None else self._lists(lm, stop_ids)
        if lists is not None:
            allowed[lists.separator] = False
        if (self.min_tokens > 0 or lists is not None) and not allowed.any():
            raise SupportError(
                "support allows nothing: no token is left after banned, special and stop tokens; widen allowed_tokens"
            )
        tool = None if self.tool is None else BoundTool(tool_from_spec(self.tool), lm, stop_ids)
        automaton = None
        if lists is not None:
            automaton = lists.automaton(allowed, self.min_tokens, self.max_tokens)
        elif self.pattern is not None:
            automaton = pattern_automaton(self.pattern, lm, allowed, self.min_tokens, self.max_tokens)
        return BoundSupport(
            stop_ids, self.min_tokens, self.max_tokens, allowed, tool, lists, self.pattern, automaton
        )

    def _lists(self, lm: LanguageModel, stop_ids: Sequence[int]) -> Lists:
        assert self.separator is not None
        separator, fits = lm.token_id(self.separator), (self.max_tokens + 1) // 2
        if separator in stop_ids:
            raise SupportError(f"separator {self.separator!r} is a stop token too; use another of the two")
        maximum = fits if self.max_statements is None else min(self.max_statements, fits)
        return Lists(separator, self.min_statements, maximum)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, str) or _is_int(value)


@dataclass(frozen=True)
class BoundSupport:
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
