"""The support as a user states it, and its translation into a law for one tokenizer (`amortlm.support.law`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from amortlm.errors import ConfigError, SupportError
from amortlm.support.law import SupportLaw
from amortlm.support.lists import Lists
from amortlm.support.patterns import pattern_automaton
from amortlm.support.tools import BoundTool, Tool, tool_from_spec

if TYPE_CHECKING:
    from amortlm.text.codec import Codec

Tokens = Sequence[str | int] | None
MOST = 1_000_000  # tokens


@dataclass(frozen=True)
class Support:
    """Completions of min_tokens to max_tokens allowed tokens, ended by a stop token.

    stop             one token or several (text or id); not part of the completion
    min_tokens       stopping is impossible before this many tokens
    max_tokens       after this many tokens stopping is certain
    allowed_tokens   only these may be written (default: all but special tokens and tokens without text)
    banned_tokens    never written, even if in allowed_tokens
    tool             a `Tool`, "calculator", or a JSON form. It writes into the completion, also tokens not allowed
    separator        one token (text or id). With it, a completion is a list of statements: "s1 SEP s2 SEP s3", none
                     of them empty
    min_statements   stopping is impossible before this many statements
    max_statements   no separator after this many statements (default: as many as fit). Set it equal to min_statements
                     for latents in sequence, "{z1}{z2}" in a target
    pattern          a regular expression that the whole text matches, without its outer white space (as for
                     `constraint.matches`), or several that it all matches. Binding raises SupportError if they are not
                     regular or too large

    Stop tokens are never written inside a completion. Special tokens are written only if allowed_tokens names them;
    then they appear in the text that constraints and verifiers read. The separator is always allowed, and counts as a
    token of the completion.

    Raises SupportError for values of the wrong type, for a support that allows nothing, and for combinations that are
    not possible (a separator or pattern with a tool, a pattern with a separator).
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
    pattern: str | Sequence[str] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The regular expressions that a completion matches, all of them."""
        given = () if self.pattern is None else self.pattern
        return (given,) if isinstance(given, str) else tuple(given)

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
                    "min_statements and max_statements count the statements between separators: give separator="
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
                "a pattern decides about every token of a completion: take out tool or separator (the pattern can "
                "contain the separator), or put constraint.matches(pattern) into the target"
            )

    def __repr__(self) -> str:
        """As it is written: without what is left at its default."""
        given = [
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return f"Support({', '.join(given)})"

    def _check_types(self) -> None:
        """Raise SupportError for a value of the wrong type (True is not a token)."""
        for name in ("min_tokens", "max_tokens", "min_statements", "max_statements"):
            value = getattr(self, name)
            if not (_is_int(value) or (value is None and name == "max_statements")):
                raise SupportError(f"{name} must be a whole number, got {value!r}")
            if value is not None and value > MOST:
                raise SupportError(f"{name}={value} is more than any model can read; give at most {MOST:,}")
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
        several = isinstance(self.pattern, list | tuple) and self.pattern
        if self.pattern is not None and not all(isinstance(x, str) for x in (several or [self.pattern])):
            raise SupportError(
                f"pattern must be text, or a list of texts that all match, got {self.pattern!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form. Raises ConfigError for a tool that cannot be saved by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tool"] = None if self.tool is None else tool_from_spec(self.tool).to_spec()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def stated(self) -> dict[str, Any]:
        """JSON form to compare with; a tool that cannot be saved by name is only named."""
        try:
            return self.to_dict()
        except ConfigError:
            return {**replace(self, tool=None).to_dict(), "tool": type(self.tool).__qualname__}

    def bind(self, lm: Codec) -> SupportLaw:
        """The law of this support for a model's tokenizer. Raises SupportError if a token is unknown, if nothing is
        allowed, if max_tokens exceeds the model's context even without a prompt, or for a pattern that cannot be
        bound."""
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
            automaton = pattern_automaton(self.patterns, lm, allowed, self.min_tokens, self.max_tokens)
        return SupportLaw(
            stop_ids, self.min_tokens, self.max_tokens, allowed, tool, lists, self.patterns, automaton
        )

    def _lists(self, lm: Codec, stop_ids: Sequence[int]) -> Lists:
        assert self.separator is not None
        separator, fits = lm.token_id(self.separator), (self.max_tokens + 1) // 2
        if separator in stop_ids:
            raise SupportError(f"separator {self.separator!r} is also a stop token; change one of the two")
        maximum = fits if self.max_statements is None else min(self.max_statements, fits)
        return Lists(separator, self.min_statements, maximum)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, str) or _is_int(value)
