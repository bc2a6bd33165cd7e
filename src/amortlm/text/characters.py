"""Characters as patterns read them: kinds, and UTF-8, in which tokens may hold parts of a character."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from amortlm.text.positions import Positions

Ints = NDArray[np.int64]
CODES = sys.maxunicode + 1
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character
NONE = -1  # no character is emitted; no way on


class Kinds(NamedTuple):
    """Characters in kinds; those of a kind are read alike by some patterns.

    of       [CODES] the kind of each code point
    readers  [K][patterns] the positions of each pattern that read a kind
    space    [K] bool: white space?
    """

    of: Ints
    readers: list[list[int]]
    space: list[bool]

    @classmethod
    def of_patterns(cls, patterns: Sequence[Positions]) -> Kinds:
        leaves = [(leaf.pattern, leaf.flags) for pattern in patterns for leaf in pattern.leaves]
        spans = [_spans(*leaf) for leaf in (*dict.fromkeys(leaves), (r"\s", 0))]
        cuts = np.unique(np.concatenate([np.array([0, CODES]), *(np.ravel(found) for found in spans)]))
        reads = np.zeros((len(cuts) - 1, len(spans)), dtype=bool)
        for column, found in zip(reads.T, spans, strict=True):
            for first, last in np.searchsorted(cuts, found).reshape(-1, 2).tolist():
                column[first:last] = True
        kinds, kind = np.unique(reads, axis=0, return_inverse=True)
        number = {leaf: i for i, leaf in enumerate(dict.fromkeys(leaves))}
        readers = [[_union(pattern, number, row) for pattern in patterns] for row in kinds.tolist()]
        return cls(np.repeat(kind.ravel(), np.diff(cuts)), readers, kinds[:, -1].tolist())


def _union(pattern: Positions, number: dict[tuple[str, int], int], reads: Sequence[bool]) -> int:
    found = 0
    for leaf, positions in pattern.leaves.items():
        if reads[number[leaf.pattern, leaf.flags]]:
            found |= positions
    return found


@lru_cache(maxsize=4096)
def _spans(source: str, flags: int) -> Ints:
    """[n, 2] the ranges of code points that match a one-character pattern."""
    found = [m.span() for m in re.compile(f"(?:{source})+", flags).finditer(_every())]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


@lru_cache(maxsize=1)
def _every() -> str:
    return "".join(map(chr, range(CODES)))


class Utf8(NamedTuple):
    """A decoder of UTF-8 that replaces what is no character, as `bytes.decode(errors="replace")` does.

    Its P states say what the bytes read since the last character may become; those from which the same kinds come are
    one. State 0: nothing is left over.

    after  [P, 256] the state after one more byte
    first, second  [P, 256] the kinds of the characters that this byte completes, in order; NONE: no more. A byte that
             cannot go on completes a replacement character, and may be a character itself
    """

    after: Ints
    first: Ints
    second: Ints

    @classmethod
    def of_kinds(cls, kind: Ints) -> Utf8:
        """kind [CODES]: the kind of each code point."""
        # From the last byte of a character to its first: what each of the 64 bytes 80..BF completes or goes on to.
        lasts, last = _distinct(kind.reshape(-1, 64))
        upper = last.reshape(
            -1, 64
        ).copy()  # rows: a code point's upper bits, 16 of three bytes, then of four bytes
        upper[0x0, :32] = NONE  # these need two bytes only
        upper[0xD, 32:] = NONE  # surrogates
        middles, middle = _distinct(upper)
        top = np.full((5, 64), NONE)
        top.ravel()[16 : len(upper)] = middle[16:]
        tops, lead = _distinct(top)
        levels = 1 + np.cumsum(
            [0, len(lasts), len(middles)]
        )  # the first state with one, two, three bytes to come
        ways = np.full((1 + len(lasts) + len(middles) + len(tops), 64), NONE)
        ways[levels[1] : levels[2]] = np.where(middles == NONE, NONE, middles + levels[0])
        ways[levels[2] :] = np.where(tops == NONE, NONE, tops + levels[1])

        begins = np.zeros(256, dtype=np.int64)  # the state after a byte that begins a character
        begins[0xC2:0xE0] = last[0x02:0x20] + levels[0]
        begins[0xE0:0xF0] = middle[:16] + levels[1]
        begins[0xF0:0xF5] = lead + levels[2]
        replaced = int(kind[ord(REPLACEMENT)])
        alone = np.where(begins > 0, NONE, replaced)  # what a byte completes that nothing precedes
        alone[:0x80] = kind[:0x80]
        after, first = np.tile(begins, (len(ways), 1)), np.full((len(ways), 256), replaced)
        second = np.tile(alone, (len(ways), 1))
        first[0], second[0] = alone, NONE
        inside, goes, done = slice(0x80, 0xC0), ways != NONE, slice(levels[0], levels[1])
        after[:, inside][goes], first[:, inside][goes], second[:, inside][goes] = ways[goes], NONE, NONE
        after[done, inside], first[done, inside], second[done, inside] = 0, lasts, NONE
        return cls(after, first, second)


def _distinct(rows: Ints) -> tuple[Ints, Ints]:
    """(the distinct rows [n, 64], the number of each row's)."""
    found, number = np.unique(rows, axis=0, return_inverse=True)
    return found, number.ravel()
