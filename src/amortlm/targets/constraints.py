"""Constraints c(z) and black-box verifiers: terms that read the text or the tokens of a completion.

A hard constraint gives log R = -inf where it fails. With `penalty=p` it gives -p nats instead, which leaves
every state a finite reward (what training from many illegal states wants).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError
from amortlm.targets.base import Scoring, Target
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

Decode = Callable[[Sequence[int]], str]


def state_texts(scoring: Scoring, decode: Decode) -> list[list[str | None]]:
    """Text of z_1:t at every stopping state of every trajectory (None elsewhere), decoded once per batch."""

    def build() -> list[list[str | None]]:
        cache: dict[tuple[int, ...], str] = {}
        out = []
        masks = scoring.rollouts.stop_mask.tolist()
        for tokens, mask in zip(scoring.rollouts.tokens.tolist(), masks, strict=True):
            texts: list[str | None] = []
            for t, allowed in enumerate(mask):
                prefix = tuple(tokens[:t])
                if allowed and prefix not in cache:
                    cache[prefix] = decode(prefix)
                texts.append(cache[prefix] if allowed else None)
            out.append(texts)
        return out

    return scoring.memo(("texts", decode), build)


def _rows_of(rollouts: Rollouts) -> list[Row]:
    return [rollouts.rows[i] for i in rollouts.row_index.tolist()]


class _TextTerm(Target):
    """A term that reads text or tokens: it borrows the model's tokenizer when the target is bound."""

    lm: LanguageModel | None = None

    def bind(self, lm: LanguageModel) -> Target:
        bound = copy.copy(self)
        bound.lm = lm
        return bound

    @property
    def bound_lm(self) -> LanguageModel:
        if self.lm is None:
            raise ConfigError(
                f"{self!r} does not know the tokenizer yet: call target.bind(lm) before score()"
            )
        return self.lm


class Constraint(_TextTerm):
    """Base of all constraints: 0 where it holds, -penalty (default: -inf, hard) where it fails."""

    def __init__(self, penalty: float | None = None):
        if penalty is not None and not (penalty > 0 and math.isfinite(penalty)):
            raise RewardError(
                f"a penalty is a positive number of nats, or None for a hard constraint; got {penalty}"
            )
        self.penalty = penalty

    @property
    def hard(self) -> bool:
        return self.penalty is None

    @abstractmethod
    def holds(self, scoring: Scoring) -> Tensor:
        """[B, T+1] bool: does z_1:t satisfy the constraint (read at stopping states only)."""

    @abstractmethod
    def settings(self) -> tuple[str, Any]:
        """(name, arguments) of the term in a spec."""

    def score_batch(self, scoring: Scoring) -> Tensor:
        ok = self.holds(scoring)
        fail = -math.inf if self.penalty is None else -self.penalty
        return torch.zeros(ok.shape, device=ok.device).masked_fill(~ok, fail)

    def to_spec(self) -> list[dict[str, Any]]:
        name, arguments = self.settings()
        return [{name: arguments} if self.penalty is None else {name: arguments, "penalty": self.penalty}]

    def __repr__(self) -> str:
        name, arguments = self.settings()
        return f"{name}({arguments!r})"


class _TextConstraint(Constraint):
    @abstractmethod
    def accepts(self, text: str, row: Row) -> bool: ...

    def holds(self, scoring: Scoring) -> Tensor:
        rows = _rows_of(scoring.rollouts)
        texts = state_texts(scoring, self.bound_lm.decode)
        ok = [
            [text is not None and self.accepts(text, row) for text in line]
            for line, row in zip(texts, rows, strict=True)
        ]
        return torch.tensor(ok, device=scoring.rollouts.tokens.device)


class Contains(_TextConstraint):
    """Each word occurs in the text as a whole word, in any order, letter case ignored."""

    def __init__(self, words: Sequence[str], penalty: float | None = None):
        super().__init__(penalty)
        if not words or not all(words):
            raise ConfigError("contains() needs at least one word")
        self.words = list(words)
        self._patterns = [re.compile(rf"(?<!\w){re.escape(w)}(?!\w)", re.IGNORECASE) for w in words]

    def accepts(self, text: str, row: Row) -> bool:
        return all(p.search(text) for p in self._patterns)

    def settings(self) -> tuple[str, Any]:
        return "contains", self.words


class Matches(_TextConstraint):
    """The whole text, outer white space removed, matches a regular expression."""

    def __init__(self, pattern: str, penalty: float | None = None):
        super().__init__(penalty)
        try:
            self.pattern = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"regular expression {pattern!r}: {e}") from None

    def accepts(self, text: str, row: Row) -> bool:
        return self.pattern.fullmatch(text.strip()) is not None

    def settings(self) -> tuple[str, Any]:
        return "matches", self.pattern.pattern


class Predicate(_TextConstraint):
    """`fn(text) -> bool`, or `fn(text, row) -> bool` when it takes two arguments.

    A function given by import path ("package.module:function") can be saved with a posterior.
    """

    def __init__(self, fn: Callable[..., bool] | str, penalty: float | None = None):
        super().__init__(penalty)
        self.fn, self.path = resolve_function(fn)
        self._wants_row = takes_row(self.fn)

    def accepts(self, text: str, row: Row) -> bool:
        return bool(self.fn(text, row) if self._wants_row else self.fn(text))

    def settings(self) -> tuple[str, Any]:
        return "predicate", require_path(self.path, self.fn)

    def __repr__(self) -> str:
        return f"predicate({self.path or _name(self.fn)})"


class AllowedTokens(Constraint):
    """Every token of the completion is one of `tokens` (strings or ids)."""

    def __init__(self, tokens: Iterable[str | int], penalty: float | None = None):
        super().__init__(penalty)
        self.tokens = list(tokens)

    def holds(self, scoring: Scoring) -> Tensor:
        tokens = scoring.rollouts.tokens
        ids = [self.bound_lm.token_id(t) for t in self.tokens]
        bad = ~torch.isin(tokens, torch.tensor(ids, device=tokens.device))
        return torch.nn.functional.pad(bad.cumsum(1), (1, 0)) == 0

    def settings(self) -> tuple[str, Any]:
        return "allowed_tokens", self.tokens


class Canonical(Constraint):
    """The completion is what the tokenizer itself writes for its text.

    Without it a text has as much mass as it has tokenisations: " 57" may be one token, or two, or three.
    """

    def holds(self, scoring: Scoring) -> Tensor:
        encode = self.bound_lm.encode_continuation
        texts = state_texts(scoring, self.bound_lm.decode)
        ok = [
            [text is not None and encode(text) == tokens[:t] for t, text in enumerate(line)]
            for line, tokens in zip(texts, scoring.rollouts.tokens.tolist(), strict=True)
        ]
        return torch.tensor(ok, device=scoring.rollouts.tokens.device)

    def settings(self) -> tuple[str, Any]:
        return "canonical", True


class Length(Constraint):
    """Between `minimum` and `maximum` tokens, the stop symbol not counted."""

    def __init__(self, minimum: int = 0, maximum: int | None = None, penalty: float | None = None):
        super().__init__(penalty)
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise ConfigError(f"length({minimum}, {maximum}) allows nothing")
        self.minimum, self.maximum = minimum, maximum

    def holds(self, scoring: Scoring) -> Tensor:
        mask = scoring.rollouts.stop_mask
        states = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        ok = states >= self.minimum
        return ok if self.maximum is None else ok & (states <= self.maximum)

    def settings(self) -> tuple[str, Any]:
        return "length", {"minimum": self.minimum, "maximum": self.maximum}


class Verifier(_TextTerm):
    """`fn(texts, rows) -> log scores`: a black box that judges finished completions, in nats.

    With `every_prefix=True` it is also asked about the text at every other stopping state, and then
    objectives that need every prefix (SubTB, DB) can use it.
    """

    def __init__(
        self,
        fn: Callable[[list[str], list[Row]], Sequence[float]] | str,
        every_prefix: bool = False,
    ):
        self.fn, self.path = resolve_function(fn)
        self.every_prefix = every_prefix

    def __repr__(self) -> str:
        return f"verifier({self.path or _name(self.fn)})"

    def to_spec(self) -> list[dict[str, Any]]:
        path = require_path(self.path, self.fn)
        return [{"verifier": {"function": path, "every_prefix": self.every_prefix}}]

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        asked = (rollouts if self.every_prefix else rollouts.final_only()).stop_mask
        rows = _rows_of(rollouts)
        texts = state_texts(scoring, self.bound_lm.decode)
        where = asked.nonzero().tolist()
        batch = [(texts[b][t] or "", rows[b]) for b, t in where]
        scores = list(self.fn([text for text, _ in batch], [row for _, row in batch])) if batch else []
        if len(scores) != len(where):
            raise RewardError(
                f"{self!r} returned {len(scores)} scores for {len(where)} texts; return one per text"
            )
        out = torch.zeros(asked.shape, device=asked.device)
        out[asked] = torch.tensor([float(s) for s in scores], device=asked.device)
        return out


def resolve_function(fn: Callable[..., Any] | str) -> tuple[Callable[..., Any], str | None]:
    """A callable and its import path (None for lambdas and local functions)."""
    if isinstance(fn, str):
        module, _, name = fn.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise ConfigError(f"cannot import {fn!r} ({e}); write 'package.module:function'") from None
        return found, fn
    home, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    importable = home not in (None, "__main__") and name.isidentifier()
    return fn, f"{home}:{name}" if importable else None


def takes_row(fn: Callable[..., Any]) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional for p in inspect.signature(fn).parameters.values()) >= 2


def _name(fn: Callable[..., Any]) -> str:
    """The same in every process, unlike repr(fn)."""
    return getattr(fn, "__qualname__", type(fn).__name__)


def require_path(path: str | None, fn: Callable[..., Any]) -> str:
    if path is None:
        raise ConfigError(
            f"{fn!r} cannot be saved by name: define it at the top level of an importable module (not __main__, not a "
            "lambda), or pass 'package.module:function'"
        )
    return path


def contains(*words: str, penalty: float | None = None) -> Contains:
    """Each word occurs as a whole word, in any order, letter case ignored."""
    return Contains(words, penalty)


def matches(pattern: str, penalty: float | None = None) -> Matches:
    """The whole text, outer white space removed, matches the regular expression."""
    return Matches(pattern, penalty)


def allowed_tokens(*tokens: str | int, penalty: float | None = None) -> AllowedTokens:
    """Only these tokens occur. To forbid others outright, use `Support(allowed_tokens=...)`: it costs nothing."""
    return AllowedTokens(tokens, penalty)


def canonical(penalty: float | None = None) -> Canonical:
    """The completion is what the tokenizer itself writes for its text: one string per text."""
    return Canonical(penalty)


def length(minimum: int = 0, maximum: int | None = None, penalty: float | None = None) -> Length:
    """Between `minimum` and `maximum` tokens, the stop symbol not counted."""
    return Length(minimum, maximum, penalty)


def predicate(fn: Callable[..., bool] | str, penalty: float | None = None) -> Predicate:
    """`fn(text)` or `fn(text, row)` is true. A string "package.module:function" is imported."""
    return Predicate(fn, penalty)


def verifier(
    fn: Callable[[list[str], list[Row]], Sequence[float]] | str, every_prefix: bool = False
) -> Verifier:
    """log scores `fn(texts, rows)` of finished completions, in nats."""
    return Verifier(fn, every_prefix)
