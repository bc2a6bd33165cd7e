"""Supports whose completions match regular expressions: constrained decoding of q, in training and sampling."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from amortlm import cache
from amortlm.errors import ConfigError, SupportError
from amortlm.support.automaton import Automaton
from amortlm.support.spelling import Spelling, UnsuitableError, spelling
from amortlm.support.token_tables import Characters, TooLargeError, token_tables
from amortlm.text.characters import Ints, Kinds
from amortlm.text.positions import START, Positions

if TYPE_CHECKING:
    from amortlm.text.codec import Codec

FORMAT = 2  # of the cached tables: increase it when the code below makes other tables
MAX_NODES = 20_000
MAX_VISITS = 2_000_000  # visits of positions, summed over the nodes: some seconds


def pattern_automaton(
    patterns: Sequence[str],
    lm: Codec,
    allowed: Tensor,
    min_tokens: int,
    max_tokens: int,
    *,
    strict: bool = False,
) -> Automaton:
    """The automaton over tokens of `allowed` [V] whose texts, outer white space removed, match all the patterns.

    Tokens that are parts of characters are never written if the tables would be too large with them, nor are those of
    which it is not known what they write (`support.spelling`); with `strict` these are errors.
    Raises SupportError for a pattern that is not regular, if nothing of min_tokens to max_tokens such tokens matches,
    and UnsuitableError for an automaton that is too large, or a tokenizer whose texts do not join.
    """
    written = spelling(lm, allowed)
    if strict and written.unknown:
        raise UnsuitableError(
            f"{lm.name}: it is not known what {len(written.unknown):,} allowed tokens write",
            "ban these tokens",
        )
    tables = _cached(patterns, written, len(allowed), strict)
    automaton = Automaton(
        tables["step"].long(), tables["token_class"].long(), tables["accepts"], min_tokens, max_tokens
    )
    if not automaton.can[0, 0]:
        raise SupportError(
            f"no text of {min_tokens} to {max_tokens} allowed tokens matches {_shown(patterns)}; widen the pattern, "
            "max_tokens or allowed_tokens (white space around a text is removed before matching)"
        )
    return automaton


def _cached(patterns: Sequence[str], written: Spelling, size: int, strict: bool) -> dict[str, Tensor]:
    """The tables, from the disk if they were made before."""
    # Everything that the tables depend on: `re` and its character classes change with the Python version.
    parts = [(token, list(found)) for token, found in written.parts.items()]
    key = [FORMAT, sys.version, list(patterns), size, list(written.texts.items()), parts]
    name = f"patterns/{hashlib.sha256(json.dumps(key).encode()).hexdigest()}"
    tables = cache.load(name)
    if tables is None:
        try:
            tables = _tables(patterns, written, size)
        except UnsuitableError:
            if strict or not written.parts:
                raise
            return _cached(patterns, replace(written, parts={}), size, strict)
        cache.store(name, tables)
    return tables


def _tables(patterns: Sequence[str], written: Spelling, size: int) -> dict[str, Tensor]:
    """The tables step [S, C], token_class [size] and accepts [S] of an `Automaton`."""
    try:
        return token_tables(_characters(patterns, written), written, size)
    except TooLargeError as e:
        raise UnsuitableError(
            f"pattern {_shown(patterns)} needs {e}, which is too much",
            "use smaller counts (after .* each count doubles the nodes, nested counts multiply), * and + where "
            "max_tokens bounds the length anyway, fewer allowed_tokens, or put constraint.matches(pattern) into the "
            "target",
        ) from None


def _characters(patterns: Sequence[str], written: Spelling) -> Characters:
    """The smallest automaton over characters of the texts that match all patterns."""
    try:
        found = [Positions(pattern) for pattern in patterns]
    except ConfigError as e:
        raise SupportError(str(e)) from None
    kinds = Kinds.of_patterns(found)
    number = np.arange(len(kinds.space))
    if not written.parts:  # then only the characters of the texts can be written
        used = sorted({int(kinds.of[ord(c)]) for text in written.texts.values() for c in text})
        number = np.full(len(kinds.space), -1)
        number[used] = np.arange(len(used))
        kinds = Kinds(kinds.of, [kinds.readers[k] for k in used], [kinds.space[k] for k in used])
    whole: tuple[Ints, NDArray[np.bool_]] | None = None
    for i, pattern in enumerate(found):
        one = _minimal(*_deterministic(pattern, [readers[i] for readers in kinds.readers], kinds.space))
        whole = one if whole is None else _minimal(*_both(whole, one))
    assert whole is not None
    return Characters(*whole, number[kinds.of])


def _deterministic(
    pattern: Positions, readers: Sequence[int], spaces: Sequence[bool]
) -> tuple[Ints, NDArray[np.bool_]]:
    """(table [S, K]: node after each kind of character; [S] bool: may a text end here).

    readers [K]: the positions of the pattern that read each kind; spaces [K]: is it white space?
    White space is treated as by `text.strip()`: it is skipped before the first other character, and at the end it does
    not change whether the text matches. So a node is a set of positions, with a flag: did the text match at its last
    character that is not white space?
    """
    first = (START, bool(START & pattern.final))
    nodes, number = [first], {first: 0}
    table: list[list[int]] = []
    visits = 0
    for node, final in nodes:  # grows
        visits += node.bit_count()
        if len(nodes) > MAX_NODES or visits > MAX_VISITS:
            each = f", each of {visits // len(table):,} positions" if visits > MAX_VISITS else ""
            raise TooLargeError(f"more than {len(nodes):,} nodes{each}")
        row, ahead = [], pattern.after(node)
        for reads, space in zip(readers, spaces, strict=True):
            after = ahead & reads
            if not space:
                to = (after, bool(after & pattern.final))
            elif node == START:
                to = (node, final)
            else:
                to = (after, final)
            if to not in number:
                number[to] = len(nodes)
                nodes.append(to)
            row.append(number[to])
        table.append(row)
    return np.array(table).reshape(len(nodes), len(readers)), np.array([final for _, final in nodes])


def _both(
    a: tuple[Ints, NDArray[np.bool_]], b: tuple[Ints, NDArray[np.bool_]]
) -> tuple[Ints, NDArray[np.bool_]]:
    """The automaton of the texts that two automata accept: its nodes are the pairs that one text leads to."""
    (left, left_ends), (right, right_ends) = a, b
    dead, width = len(left) * len(right), len(right)
    nodes, number = [0], {0: 0, dead: dead}
    table: list[list[int]] = []
    for node in nodes:  # grows
        if len(nodes) > MAX_NODES:
            raise TooLargeError(f"more than {len(nodes):,} nodes")
        i, j = left[node // width], right[node % width]
        row = np.where((i < len(left)) & (j < width), i * width + j, dead).tolist()
        for to in row:
            if to not in number:
                number[to] = len(nodes)
                nodes.append(to)
        table.append(row)
    number[dead] = len(nodes)
    step = np.vectorize(number.__getitem__, otypes=[np.int64])(np.array(table).reshape(len(nodes), -1))
    pairs = np.array(nodes)
    return step, left_ends[pairs // width] & right_ends[pairs % width]


def _minimal(
    table: NDArray[np.int64], accepts: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The same automaton with equivalent nodes merged (Hopcroft's algorithm); the first node stays the first.

    Nodes from which no text can end are left out: in the table, S (the number of nodes) stands for them.
    """
    dead = len(table)
    table = np.vstack([table, np.full((1, table.shape[1]), dead)])
    sources: list[
        list[list[int]]
    ] = []  # [kind of character][node]: the nodes from which this kind leads to the node
    for column in table.T.tolist():
        sources.append([[] for _ in column])
        for node, after in enumerate(column):
            sources[-1][after].append(node)
    ends = {int(s) for s in np.flatnonzero(accepts)}
    blocks = [set(range(dead + 1)) - ends, ends]
    block = [int(node in ends) for node in range(dead + 1)]
    waiting = {0, 1}
    while waiting:
        splitter = list(blocks[waiting.pop()])
        for leads in sources:
            touched: dict[int, set[int]] = {}
            for node in splitter:
                for source in leads[node]:
                    touched.setdefault(block[source], set()).add(source)
            for old, part in touched.items():
                if len(part) == len(blocks[old]):
                    continue
                blocks[old] -= part
                if len(part) > len(blocks[old]):
                    part, blocks[old] = blocks[old], part
                waiting.add(len(blocks))  # the smaller part; the larger part is waiting if the whole was
                for node in part:
                    block[node] = len(blocks)
                blocks.append(part)
    kept = dict.fromkeys(block[:dead])
    kept.pop(block[dead], None)
    number = np.full(len(blocks), len(kept))
    number[list(kept)] = np.arange(len(kept))
    members = [min(blocks[b]) for b in kept] or [dead]
    return number[np.array(block)[table[members]]], np.append(accepts, False)[members]


def _shown(patterns: Sequence[str]) -> str:
    return " and ".join(map(repr, patterns))
