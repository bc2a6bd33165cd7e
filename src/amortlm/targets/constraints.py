"""Constraints c(z) and black-box verifiers: terms that read the text or the tokens of a completion.

A hard constraint gives log R = -inf to a completion that violates it. With `penalty=p` it gives -p nats instead, so
that every state has a finite reward. This helps if most of the first samples violate the constraint.
"""

from __future__ import annotations

import copy
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError
from amortlm.support.spec import Support
from amortlm.targets.base import Scoring
from amortlm.targets.functions import (
    Function,
    call,
    check_timeout,
    function_of,
    name_of,
    require_reference,
    shown,
    takes_row,
)
from amortlm.targets.texts import (
    Constraint,
    TextConstraint,
    TextTerm,
    rows_of,
    state_statements,
    state_texts,
)
from amortlm.text.grammar import grammar_pattern
from amortlm.text.json_schema import json_pattern
from amortlm.text.positions import Positions
from amortlm.text.regular import check_pattern
from amortlm.types import Row

SECONDS = 1  # time limit of `matches` for one text; usually it takes microseconds


class Contains(TextConstraint):
    """Each word occurs in the text as a whole word, in any order, ignoring case. Raises ConfigError without words."""

    def __init__(self, words: Sequence[str], penalty: float | None = None):
        super().__init__(penalty)
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ConfigError('contains() needs at least one word, each as a text: contains("dog", "park")')
        self.words = list(words)
        self._patterns = [re.compile(rf"(?<!\w){re.escape(w)}(?!\w)", re.IGNORECASE) for w in words]

    def accepts(self, text: str, row: Row) -> bool:
        return all(p.search(text) for p in self._patterns)

    def narrowed(self, support: Support, allowed: Sequence[int]) -> Support | None:
        if any(word != word.strip() for word in self.words):
            return None  # a pattern does not see the white space around a text
        words = [rf"(?s:.*\W)?(?i:{re.escape(word)})(?s:\W.*)?" for word in self.words]
        return _with_patterns(support, words)

    def settings(self) -> tuple[str, Any]:
        return "contains", self.words


class Matches(TextConstraint):
    """The whole text, outer white space removed, matches a regular expression.

    Matching does not backtrack, as for a support's pattern. Expressions with look-around, back-references or anchors
    (^, $, \\b) are matched by the library `regex`, which backtracks; a text that takes more than SECONDS raises
    ConfigError, and so does an invalid expression.
    """

    def __init__(self, pattern: str, penalty: float | None = None):
        super().__init__(penalty)
        check_pattern(pattern)
        self.pattern = pattern
        try:
            self._positions: Positions | None = Positions(pattern)
        except ConfigError:
            self._positions = None
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError) as e:
            raise ConfigError(f"regular expression {pattern!r}: {e}") from None

    def accepts(self, text: str, row: Row) -> bool:
        if self._positions is not None:
            return self._positions.matches(text.strip())
        try:
            return self._compiled.fullmatch(text.strip(), timeout=SECONDS) is not None
        except TimeoutError:
            raise ConfigError(
                f"regular expression {self.pattern!r} did not finish with {text!r} in {SECONDS} seconds, because "
                "matching tries every division of the text. Leave out repetitions of repetitions, as in (a+)+, and "
                "alternatives that begin alike; or use Support(pattern=...), which does not backtrack"
            ) from None

    def narrowed(self, support: Support, allowed: Sequence[int]) -> Support | None:
        return None if self._positions is None else _with_patterns(support, [self.pattern])

    def settings(self) -> tuple[str, Any]:
        return "matches", self.pattern


def _with_patterns(support: Support, patterns: Sequence[str]) -> Support | None:
    if support.separator is not None:
        return None  # the automaton is that of a list
    return replace(support, pattern=tuple(dict.fromkeys((*support.patterns, *patterns))))


class Predicate(TextConstraint):
    """`fn(text) -> bool`, or `fn(text, row) -> bool` when it takes two arguments.

    A function at the top level of a module is saved with a posterior by its name, "package.module:function"; `fn` may
    also be this name. timeout: seconds for one call (see `amortlm.targets.functions.call`). Scoring raises RewardError
    if the function raises an error, returns anything but True or False, or takes longer.
    """

    name = "predicate"  # in a spec

    def __init__(
        self,
        fn: Callable[..., bool] | Function | str,
        penalty: float | None = None,
        timeout: float | None = None,
    ):
        super().__init__(penalty)
        self.function, self.timeout = function_of(fn), check_timeout(timeout)
        self._wants_row = takes_row(self.function.call)

    def accepts(self, text: str, row: Row) -> bool:
        return self._says(text, row)

    def _says(self, given: str | list[str], row: Row) -> bool:
        """What the function says of a text or of statements. Raises RewardError."""
        arguments = (given, copy.deepcopy(dict(row))) if self._wants_row else (given,)
        what = f"{self!r}, called with {given!r},"
        got = call(self.function.call, *arguments, timeout=self.timeout, what=what)
        if str(getattr(got, "dtype", "")) in ("bool", "torch.bool") and math.prod(got.shape) == 1:
            return bool(got)  # a truth value of numpy or torch
        if isinstance(got, bool):
            return got
        raise RewardError(
            f"{what} returned {shown(got)}; return True or False (for a regex match: `is not None`)"
        )

    def settings(self) -> tuple[str, Any]:
        reference = require_reference(self.function)
        timeout = {} if self.timeout is None else {"timeout": self.timeout}
        return self.name, {"function": reference, **timeout} if timeout else reference

    def __repr__(self) -> str:
        return f"{self.name}({self.function.reference or name_of(self.function.call)})"


class _StatementConstraint(Constraint):
    """A constraint on the texts of a list's statements, at every stopping state: the list as it is there.

    What is said of a list with an unfinished last statement is said of the list that ends there, so a fault that no
    later token mends has R = 0 from its first stopping state on.
    """

    statements = 1

    @abstractmethod
    def allows(self, statements: list[str], row: Row) -> bool: ...

    def holds(self, scoring: Scoring) -> Tensor:
        rows, decode = rows_of(scoring.rollouts), self.bound_lm.decode
        ok = [
            [found is not None and self.allows([decode(s) for s in found], row) for found in line]
            for line, row in zip(state_statements(scoring.rollouts), rows, strict=True)
        ]
        return torch.tensor(ok, device=scoring.rollouts.tokens.device)


class Distinct(_StatementConstraint):
    """No two statements of a list have the same text, outer white space removed."""

    def allows(self, statements: list[str], row: Row) -> bool:
        return len({text.strip() for text in statements}) == len(statements)

    def settings(self) -> tuple[str, Any]:
        return "distinct", True


class Relation(_StatementConstraint, Predicate):
    """`fn(statements) -> bool`, or `fn(statements, row) -> bool`: a predicate of the statements of a list.

    statements: their texts, in order, each with its leading space. A list has as many as the support asks for, or more,
    so fn may index as many as `min_statements`. Names, timeout and errors are those of `Predicate`.
    """

    name = "relation"

    def allows(self, statements: list[str], row: Row) -> bool:
        return self._says(statements, row)


class AllowedTokens(Constraint):
    """Every token of the completion is one of `tokens` (texts or ids). `Support(allowed_tokens=...)` is better if
    possible: then q never writes other tokens. Raises ConfigError for other values."""

    def __init__(self, tokens: Iterable[str | int], penalty: float | None = None):
        super().__init__(penalty)
        self.tokens = list(tokens)
        odd = [t for t in self.tokens if isinstance(t, bool) or not isinstance(t, str | int)]
        if odd:
            raise ConfigError(f"allowed_tokens() takes tokens as text or ids, got {odd[0]!r}")

    def holds(self, scoring: Scoring) -> Tensor:
        tokens = scoring.rollouts.tokens
        ids = [self.bound_lm.token_id(t) for t in self.tokens]
        bad = ~torch.isin(tokens, torch.tensor(ids, device=tokens.device))
        return torch.nn.functional.pad(bad.cumsum(1), (1, 0)) == 0

    def narrowed(self, support: Support, allowed: Sequence[int]) -> Support | None:
        if support.separator is not None:
            return None  # the separator is always allowed
        ids = {self.bound_lm.token_id(t) for t in self.tokens}
        return replace(support, allowed_tokens=tuple(t for t in allowed if t in ids))

    def settings(self) -> tuple[str, Any]:
        return "allowed_tokens", self.tokens


class Canonical(Constraint):
    """The completion is the tokenizer's own tokenisation of its text.

    Without this constraint every tokenisation of a text is a separate completion: " 57" may be one token, two or three.
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
    """Between `minimum` and `maximum` tokens, without the stop symbol. Raises ConfigError for impossible lengths."""

    def __init__(self, minimum: int = 0, maximum: int | None = None, penalty: float | None = None):
        super().__init__(penalty)
        if not all(type(n) is int for n in (minimum, maximum) if n is not None):
            raise ConfigError(f"length({minimum!r}, {maximum!r}): lengths are whole numbers of tokens")
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise ConfigError(f"length({minimum}, {maximum}) allows nothing")
        self.minimum, self.maximum = minimum, maximum

    def holds(self, scoring: Scoring) -> Tensor:
        mask = scoring.rollouts.stop_mask
        states = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        ok = states >= self.minimum
        return ok if self.maximum is None else ok & (states <= self.maximum)

    def narrowed(self, support: Support, allowed: Sequence[int]) -> Support | None:
        high = support.max_tokens if self.maximum is None else min(support.max_tokens, self.maximum)
        if high == 0:
            return None  # a support has more than the empty completion
        return replace(support, min_tokens=max(support.min_tokens, self.minimum), max_tokens=high)

    def settings(self) -> tuple[str, Any]:
        return "length", {"minimum": self.minimum, "maximum": self.maximum}


class Verifier(TextTerm):
    """`fn(texts, rows) -> log scores`: a black box that judges finished completions, in nats.

    Scores are a list, array or tensor of n numbers for n texts; -inf means "impossible". With `every_prefix=True` fn is
    called with the text at every stopping state, as objectives that need every prefix (SubTB, DB) require. Scoring
    raises RewardError if fn raises an error, returns anything else, or takes more than `timeout` seconds.
    """

    def __init__(
        self,
        fn: Callable[[list[str], list[Row]], Sequence[float]] | Function | str,
        every_prefix: bool = False,
        timeout: float | None = None,
    ):
        self.function, self.timeout = function_of(fn), check_timeout(timeout)
        self.every_prefix = every_prefix

    def __repr__(self) -> str:
        return f"verifier({self.function.reference or name_of(self.function.call)})"

    def to_spec(self) -> list[dict[str, Any]]:
        spec = {"function": require_reference(self.function), "every_prefix": self.every_prefix}
        return [{"verifier": spec if self.timeout is None else {**spec, "timeout": self.timeout}}]

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        asked = (rollouts if self.every_prefix else rollouts.final_only()).stop_mask
        out = torch.zeros(asked.shape, device=asked.device)
        where = asked.nonzero().tolist()
        if where:
            rows = rows_of(rollouts)
            decoded = state_texts(scoring, self.bound_lm.decode)
            texts = [decoded[b][t] or "" for b, t in where]
            out[asked] = self._scores(texts, [rows[b] for b, _ in where]).to(asked.device)
        return out

    def _scores(self, texts: list[str], rows: list[Row]) -> Tensor:
        """[n] float32. Raises RewardError."""
        what = f"{self!r}, called with {len(texts)} texts, the first of them {texts[0]!r},"
        given = (list(texts), [copy.deepcopy(dict(row)) for row in rows])  # copies, which fn may change
        got = call(self.function.call, *given, timeout=self.timeout, what=what)
        scores = _numbers(got)
        if scores is None or scores.shape != (len(texts),):
            flat = scores is not None and scores.ndim == 1
            found = f"{len(scores)} scores for {len(texts)} texts" if flat else shown(got)  # type: ignore[arg-type]
            raise RewardError(
                f"{what} returned {found}; return one number per text, in a list or a flat array "
                "(constraint.predicate takes a function of one text that says True or False)"
            )
        bad = torch.isnan(scores.float()) | (torch.isinf(scores.float()) & (scores != -math.inf))
        if bad.any():
            i = int(bad.nonzero()[0])
            raise RewardError(
                f"{self!r} gave NaN or +inf for {texts[i]!r}; return finite numbers (or -inf for 'impossible')"
            )
        return scores.float()


def _numbers(value: Any) -> Tensor | None:
    """A list, array or tensor of numbers, of any shape, as float64; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().double().cpu() if value.dtype != torch.bool and not value.is_complex() else None
    try:
        listed = value if hasattr(value, "__array__") or isinstance(value, int | float) else list(value)
        array = np.asarray(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    return torch.from_numpy(array.astype(np.float64)) if array.dtype.kind in "iuf" else None


def contains(*words: str, penalty: float | None = None) -> Contains:
    """Each word occurs as a whole word, in any order, ignoring case."""
    return Contains(words, penalty)


def allowed_tokens(*tokens: str | int, penalty: float | None = None) -> AllowedTokens:
    """Only these tokens occur. `Support(allowed_tokens=...)` is better if possible: then q never writes others."""
    return AllowedTokens(tokens, penalty)


def json_schema(schema: Mapping[str, Any], penalty: float | None = None) -> Matches:
    """The text is JSON that is valid under a schema, in one way of writing it (`text.json_schema.json_pattern`).

    It is saved as its regular expression. Raises ConfigError for a schema that is not translated.
    """
    return Matches(json_pattern(schema), penalty)


def grammar(source: str, depth: int | None = None, penalty: float | None = None) -> Matches:
    """The text is derived by a grammar (`text.grammar.grammar_pattern`), with no rule more than `depth` times inside
    itself.

    It is saved as its regular expression. Raises ConfigError for what is no grammar, and for a grammar with rules that
    refer to themselves if depth is left out.
    """
    return Matches(grammar_pattern(source, depth), penalty)


matches, canonical, length, verifier = Matches, Canonical, Length, Verifier
predicate, relation, distinct = Predicate, Relation, Distinct
