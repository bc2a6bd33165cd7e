"""Context-free grammars as regular expressions: texts whose rules stand inside themselves a bounded number of times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amortlm.errors import ConfigError, nearest

ROOT = "root"
TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)
      | (?P<define>[A-Za-z_][\w-]*\s*::=)
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<text>"(?:[^"\\\n]|\\[^\n])*")
      | (?P<chars>\[\^?(?:[^\]\\\n]|\\[^\n])*\])
      | (?P<count>[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\})
      | (?P<sign>[|().])""",
    re.VERBOSE,
)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
LONGEST = 500_000  # characters of an expression: far more than an automaton may have places


class Token(NamedTuple):
    """kind: a group of TOKEN; where: for errors."""

    kind: str
    text: str
    where: str


class Ref(NamedTuple):
    name: str


class Repeated(NamedTuple):
    part: Node
    times: str  # as in a regular expression


class Sequenced(NamedTuple):
    parts: Sequence[Node]


class OneOf(NamedTuple):
    parts: Sequence[Node]


Node = str | Ref | Repeated | Sequenced | OneOf  # str: a regular expression


def grammar_pattern(source: str, depth: int | None = None) -> str:
    r"""The regular expression of the texts that a grammar derives from its rule `root`, for `constraint.matches`.

    source: rules in the notation of llama.cpp (GBNF) and XGrammar: `name ::= "text" | [a-z]+ (other ",")* {2,3}`, with
    `#` before comments; `\n`, `\t`, `\r`, `\xHH`, `\uHHHH` and a backslash before a sign in texts and sets; `.` is any
    character. depth: in a text, how often a rule may stand inside itself; texts that need more do not match. The
    expression grows with it, quickly where a rule refers to itself several times.

    Raises ConfigError for what is no such grammar, for a grammar with rules that refer to themselves if depth is left
    out, if no text is left, and for an expression that is too long.
    """
    if depth is not None and depth < 0:
        raise ConfigError(f"depth={depth}: a rule stands inside itself 0 times, or more")
    found = _Expansion(_Parser(source).rules(), depth).of(Ref(ROOT), {})
    if found is None:
        raise ConfigError(
            f"no text of the grammar has rules inside themselves at most {depth} times: raise depth"
        )
    return found


class _Expansion:
    """Of the parts of a grammar. inside: how often each rule has been entered; None stands for a part without texts."""

    def __init__(self, rules: Mapping[str, Node], depth: int | None):
        self.rules, self.depth = rules, depth
        self._known: dict[tuple[str, tuple[tuple[str, int], ...]], str | None] = {}

    def of(self, node: Node, inside: Mapping[str, int]) -> str | None:
        if isinstance(node, str):
            return node
        if isinstance(node, Ref):
            return self._rule(node.name, inside)
        if isinstance(node, Repeated):
            part = self.of(node.part, inside)
            if part is None:
                return "" if _may_be_none(node.times) else None
            return _short(f"(?:{part}){node.times}")
        if isinstance(node, OneOf):
            left = [found for part in node.parts if (found := self.of(part, inside)) is not None]
            return _short(f"(?:{'|'.join(left)})") if left else None
        found = ""
        for each in node.parts:
            if (more := self.of(each, inside)) is None:
                return None
            found = _short(found + more)
        return found

    def _rule(self, name: str, inside: Mapping[str, int]) -> str | None:
        entered = inside.get(name, 0)
        if entered and self.depth is None:
            raise ConfigError(
                f"the rule {name!r} refers to itself: give depth, how often it may stand inside itself, or write a "
                "repetition with *"
            )
        if entered > (self.depth or 0):
            return None
        key = (name, tuple(sorted(inside.items())))
        if key not in self._known:
            self._known[key] = self.of(self.rules[name], {**inside, name: entered + 1})
        return self._known[key]


def _may_be_none(times: str) -> bool:
    return times in ("*", "?") or (times[0] == "{" and int(re.split("[{},]", times)[1]) == 0)


def _short(expression: str) -> str:
    if len(expression) > LONGEST:
        raise ConfigError(
            "the grammar is too large as a regular expression: lower depth, or write repetitions with *"
        )
    return expression


class _Parser:
    def __init__(self, source: str):
        if not isinstance(source, str):
            raise ConfigError(f'a grammar is a text such as \'root ::= "yes" | "no"\', got {source!r}')
        self._tokens, self._at = _tokens(source), 0

    def rules(self) -> dict[str, Node]:
        """By name. Raises ConfigError for a rule that is missing or there twice."""
        rules: dict[str, Node] = {}
        while self._kind is not None:
            token = self._take()
            name = token.text.removesuffix("::=").strip()
            if token.kind != "define":
                raise ConfigError(f"{token.where}: a rule `name ::= ...` was expected, got {token.text!r}")
            if name in rules:
                raise ConfigError(f"{token.where}: there are two rules {name!r}; write one with |")
            rules[name] = self._one_of()
        for name in [ROOT, *(token.text for token in self._tokens if token.kind == "name")]:
            if name not in rules:
                known = nearest(name, rules) if rules else "it has none"
                raise ConfigError(f"the grammar has no rule {name!r}; {known}")
        return rules

    @property
    def _kind(self) -> str | None:
        return self._tokens[self._at].kind if self._at < len(self._tokens) else None

    def _next_is(self, text: str) -> bool:
        return self._kind == "sign" and self._tokens[self._at].text == text

    def _take(self) -> Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _one_of(self) -> Node:
        parts = [self._sequence()]
        while self._next_is("|"):
            self._take()
            parts.append(self._sequence())
        return OneOf(parts)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._kind not in (None, "define") and not self._next_is("|") and not self._next_is(")"):
            parts.append(self._item())
            while self._kind == "count":
                parts[-1] = Repeated(parts[-1], re.sub(r"\s", "", self._take().text))
        return Sequenced(parts)

    def _item(self) -> Node:
        token = self._take()
        if token.kind == "name":
            return Ref(token.text)
        if token.kind == "text":
            return re.escape(_unescaped(token.text[1:-1]))
        if token.kind == "chars":
            return _chars(token)
        if token.text == ".":
            return r"[\s\S]"
        if token.text == "(":
            inside = self._one_of()
            if not self._next_is(")"):
                raise ConfigError(f"{token.where}: this ( is not closed")
            self._take()
            return inside
        raise ConfigError(f"{token.where}: {token.text!r} has nothing before it")


def _tokens(source: str) -> list[Token]:
    found, at = [], 0
    while at < len(source):
        match = TOKEN.match(source, at)
        line = source.count("\n", 0, at) + 1
        if match is None:
            raise ConfigError(
                f"line {line} of the grammar: {source[at:].splitlines()[0][:40]!r} cannot be read"
            )
        assert match.lastgroup is not None
        if match.lastgroup != "skip":
            found.append(Token(match.lastgroup, match[0], f"line {line} of the grammar"))
        at = match.end()
    return found


def _unescaped(text: str) -> str:
    return ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else ESCAPES.get(m[3], m[3]), text)


def _chars(token: Token) -> str:
    """A set of characters, as Python's `re` writes it."""
    inside = token.text[1:-1]
    negated = inside.startswith("^")
    # An escaped - is a sign, and any other stands for a range, unless it is first or last.
    letters = [
        (m[0].startswith("\\"), _unescaped(m[0]))
        for m in re.finditer(r"\\x..|\\u....|\\.|.", inside[negated:])
    ]
    if not letters:
        raise ConfigError(f"{token.where}: an empty set of characters")
    out = []
    for i, (escaped, letter) in enumerate(letters):
        is_range = letter == "-" and not escaped and 0 < i < len(letters) - 1
        out.append("-" if is_range else re.escape(letter) if letter != "^" else r"\^")
    return f"[{'^' if negated else ''}{''.join(out)}]"
