"""Regular expressions of Python's `re` as automata, which read a text once from left to right, without backtracking.

`re` parses the pattern and decides which characters match, so there is only one reading of the syntax. Only the
structure becomes an automaton (Glushkov's): each place in the pattern that reads a character is a position, and
`follow` gives the positions that may come after each position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from amortlm.errors import ConfigError
from amortlm.text.regular import check_pattern

MAX_POSITIONS = 10_000
START = 1  # the set of positions before the first character: only bit 0
CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}
REFUSED = {
    ops.AT: "^, $, \\b and other anchors: the whole text is matched anyway",
    ops.ASSERT: "look-around",
    ops.ASSERT_NOT: "look-around",
    ops.GROUPREF: "back-references",
    ops.GROUPREF_EXISTS: "conditions on a group",
    ops.ATOMIC_GROUP: "atomic groups",
    ops.POSSESSIVE_REPEAT: "possessive repetition",
}
TYPE_FLAGS = re.ASCII | re.UNICODE


class Part(NamedTuple):
    """A piece of a pattern: may it match the empty text, and at which positions may it begin and end (bit sets)?"""

    nullable: bool
    first: int
    last: int


NOTHING = Part(True, 0, 0)


def bits(positions: int) -> Iterator[int]:
    """The members of a set of positions, in order."""
    digits = bin(positions)[:1:-1]
    i = digits.find("1")
    while i >= 0:
        yield i
        i = digits.find("1", i + 1)


class Positions:
    """The automaton of a pattern. Sets of positions are ints (bit sets).

    follow  [n] int: the positions that may come after position i; position 0 is the start
    leaves  one-character pattern -> the positions that read it
    final   the positions at which the text may end

    Raises ConfigError for a pattern that `check_pattern` refuses, that is not regular or that is too large.
    """

    def __init__(self, pattern: str):
        check_pattern(pattern)
        self.pattern = pattern
        self.follow = [0]
        self.leaves: dict[re.Pattern[str], int] = {}
        self._readers: dict[str, int] = {}  # positions that match each character seen so far
        tree = _parser.parse(pattern)
        try:
            whole = self._sequence(tree, tree.state.flags)
        except RecursionError:
            raise self._error("its groups are nested too deeply") from None
        self.follow[0] = whole.first
        self.final = whole.last | (START if whole.nullable else 0)

    def matches(self, text: str) -> bool:
        """Does the whole text match? The time is linear in its length."""
        reached = START
        for c in text:
            if c not in self._readers:
                self._readers[c] = self.readers(c)[0]
            reached = self.after(reached) & self._readers[c]
            if not reached:
                return False
        return bool(reached & self.final)

    def after(self, positions: int) -> int:
        """The positions that may read the next character, for any character."""
        found = 0
        for i in bits(positions):
            found |= self.follow[i]
        return found

    def readers(self, characters: str) -> list[int]:
        """The positions that match each of some distinct characters."""
        found = dict.fromkeys(characters, 0)
        for leaf, positions in self.leaves.items():
            for c in leaf.findall(characters):
                found[c] |= positions
        return list(found.values())

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"regular expression {self.pattern!r}: {reason}")

    def _sequence(self, tree: Any, flags: int) -> Part:
        # From right to left, so that many optional pieces in a row stay cheap.
        whole = NOTHING
        for op, argument in reversed(list(tree)):
            whole = self._join(self._piece(op, argument, flags), whole)
        return whole

    def _join(self, left: Part, right: Part) -> Part:
        for i in bits(left.last):
            self.follow[i] |= right.first
        return Part(
            left.nullable and right.nullable,
            left.first | (right.first if left.nullable else 0),
            right.last | (left.last if right.nullable else 0),
        )

    def _piece(self, op: Any, argument: Any, flags: int) -> Part:
        if op is ops.SUBPATTERN:
            _, add, remove, tree = argument
            kept = flags & ~(TYPE_FLAGS if add & TYPE_FLAGS else 0)
            return self._sequence(tree, (kept | add) & ~remove)
        if op is ops.BRANCH:
            parts = [self._sequence(tree, flags) for tree in argument[1]]
            nullable, first, last = parts[0]
            for part in parts[1:]:
                nullable, first, last = nullable or part.nullable, first | part.first, last | part.last
            return Part(nullable, first, last)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            low, high, tree = argument
            return self._repeat(low, high, tree, flags)
        if op not in LEAVES:
            raise self._error(f"a pattern cannot contain {REFUSED.get(op, op)}")
        return self._leaf(LEAVES[op](argument), flags)

    def _repeat(self, low: int, high: int, tree: Any, flags: int) -> Part:
        endless = high is ops.MAXREPEAT
        copies = max(low, 1) if endless else high
        whole = NOTHING
        for k in range(copies, 0, -1):
            part = self._sequence(tree, flags)
            if not part.first:  # repeated or not, it reads no character
                return NOTHING
            if endless and k == copies:
                self._join(part, part)
            part = self._join(part, whole)
            whole = Part(part.nullable or k > low, part.first, part.last)
        return whole

    def _leaf(self, source: str, flags: int) -> Part:
        if len(self.follow) > MAX_POSITIONS:
            raise self._error(
                f"more than {MAX_POSITIONS:,} places that read a character, with counted repetitions written out; use "
                "smaller counts (nested counts multiply), or * and + where max_tokens bounds the length anyway"
            )
        position = 1 << len(self.follow)
        self.follow.append(0)
        leaf = re.compile(source, flags & ~re.VERBOSE)
        self.leaves[leaf] = self.leaves.get(leaf, 0) | position
        return Part(False, position, position)


def _literal(code: int) -> str:
    return re.escape(chr(code))


def _class(members: Any) -> str:
    """The source of a class of characters, from its parsed members."""
    written = {
        ops.NEGATE: lambda _: "^",
        ops.LITERAL: _literal,
        ops.RANGE: lambda ends: "-".join(map(_literal, ends)),
        ops.CATEGORY: CATEGORIES.__getitem__,
    }
    return "".join(["[", *(written[op](argument) for op, argument in members), "]"])


LEAVES = {
    ops.ANY: lambda _: ".",
    ops.LITERAL: _literal,
    ops.NOT_LITERAL: lambda code: f"[^{_literal(code)}]",
    ops.IN: _class,
}
