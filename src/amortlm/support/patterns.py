"""Supports whose completions match a regular expression: constrained decoding of q, in training and sampling."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amortlm import cache
from amortlm.errors import ConfigError, SupportError
from amortlm.support.automaton import Automaton
from amortlm.text.positions import START, Positions

if TYPE_CHECKING:
    from amortlm.text.codec import Codec

FORMAT = 1  # of the cached tables: increase it when the code below makes other tables
BROKEN = "\ufffd"  # the text of a token that is a part of a character
MAX_NODES = 20_000
MAX_VISITS = 2_000_000  # visits of positions, summed over the nodes: some seconds
MAX_CELLS = 2**24  # cells of the table of nodes by classes of tokens: 128 MiB


def pattern_automaton(
    pattern: str, lm: Codec, allowed: Tensor, min_tokens: int, max_tokens: int
) -> Automaton:
    """The automaton over tokens of `allowed` [V] whose texts, outer white space removed, match the pattern.

    Tokens that are a part of a character are never written. Raises SupportError for a pattern that is not regular,
    whose automaton is too large, or that matches nothing of min_tokens to max_tokens such tokens.
    """
    texts = _texts(lm, allowed)
    # Everything that the tables depend on: `re` and its character classes change with the Python version.
    key = [FORMAT, sys.version, pattern, len(allowed), list(texts.items())]
    name = f"patterns/{hashlib.sha256(json.dumps(key).encode()).hexdigest()}"
    tables = cache.load(name)
    if tables is None:
        tables = _tables(pattern, texts, len(allowed))
        cache.store(name, tables)
    automaton = Automaton(
        tables["step"].long(), tables["token_class"].long(), tables["accepts"], min_tokens, max_tokens
    )
    if not automaton.can[0, 0]:
        raise SupportError(
            f"no text of {min_tokens} to {max_tokens} allowed tokens matches {pattern!r}; widen the pattern, "
            "max_tokens or allowed_tokens (white space around a text is removed before matching)"
        )
    return automaton


def _tables(pattern: str, texts: dict[int, str], size: int) -> dict[str, Tensor]:
    """The tables step [S, C], token_class [size] and accepts [S] of an `Automaton`. texts: token id -> text."""
    characters = "".join(sorted(set().union(*texts.values())))
    table, accepts, kind = _deterministic(pattern, characters)
    table, accepts = _minimal(table, accepts)
    step, token_class = _token_step(pattern, table, {t: x.translate(kind) for t, x in texts.items()}, size)
    kept = _reached(step)
    number = np.full(len(step) + 1, len(kept))
    number[kept] = np.arange(len(kept))
    return {
        "step": torch.from_numpy(number[step[kept]]).int(),
        "token_class": token_class.int(),
        "accepts": torch.from_numpy(accepts[kept]),
    }


def _deterministic(
    pattern: str, characters: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[int, str]]:
    """(table [S, K]: node after each kind of character; [S] bool: may a text end here; character -> its kind as a chr).

    White space is treated as by `text.strip()`: it is skipped before the first other character, and at the end it does
    not change whether the text matches. So a node is a set of positions, with a flag: did the text match at its last
    character that is not white space?
    """
    try:
        positions = Positions(pattern)
    except ConfigError as e:
        raise SupportError(str(e)) from None
    of = [
        (readers, c.isspace()) for readers, c in zip(positions.readers(characters), characters, strict=True)
    ]
    kinds = {reads: i for i, reads in enumerate(dict.fromkeys(of))}
    first = (START, bool(START & positions.final))
    nodes, number = [first], {first: 0}
    table: list[list[int]] = []
    visits = 0
    for node, final in nodes:  # grows
        visits += node.bit_count()
        if len(nodes) > MAX_NODES or visits > MAX_VISITS:
            each = f", each of {visits // len(table):,} positions" if visits > MAX_VISITS else ""
            raise SupportError(_too_large(pattern, f"more than {len(nodes):,} nodes{each}"))
        row, ahead = [], positions.after(node)
        for readers, space in kinds:
            after = ahead & readers
            if not space:
                to = (after, bool(after & positions.final))
            elif node == START:
                to = (node, final)
            else:
                to = (after, final)
            if to not in number:
                number[to] = len(nodes)
                nodes.append(to)
            row.append(number[to])
        table.append(row)
    kind = {ord(c): chr(kinds[reads]) for c, reads in zip(characters, of, strict=True)}
    return np.array(table).reshape(len(nodes), len(kinds)), np.array([final for _, final in nodes]), kind


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


def _token_step(
    pattern: str, table: NDArray[np.int64], texts: dict[int, str], size: int
) -> tuple[NDArray[np.int64], Tensor]:
    """(step [S, C], token_class [size]). texts: token id -> its characters, written as their kinds.

    The action of a text maps each node to the node after the text. Tokens whose texts have the same action share a
    class.
    """
    nodes = len(table)
    moves = np.vstack([table, np.full((1, table.shape[1]), nodes)]).T
    nowhere = np.full(nodes + 1, nodes)
    actions = [nowhere, np.arange(nodes + 1)]  # to the dead end; the action of the empty text (identity)
    number = {action.tobytes(): i for i, action in enumerate(actions)}
    after: dict[tuple[int, str], int] = {}
    acts: dict[str, int] = {}

    def moved(action: int, kind: str) -> int:
        """The action of a text with one more character."""
        if (action, kind) not in after:
            leads = moves[ord(kind)][actions[action]]
            after[action, kind] = number.setdefault(leads.tobytes(), len(actions))
            if after[action, kind] == len(actions):
                actions.append(leads)
            if len(actions) * nodes > MAX_CELLS:
                size = f"{nodes:,} nodes and more than {len(actions) - 1:,} kinds of tokens"
                raise SupportError(_too_large(pattern, size))
        return after[action, kind]

    for text in set(texts.values()):
        acts[text] = 1
        for kind in text:
            acts[text] = moved(acts[text], kind)
            if acts[text] == 0:
                break
    token_class = torch.zeros(size, dtype=torch.long)
    if texts:
        token_class[list(texts)] = torch.tensor([acts[text] for text in texts.values()])
    used, token_class = token_class.unique(return_inverse=True)
    return np.stack([actions[i][:-1] for i in used.tolist()], 1), token_class


def _reached(step: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nodes that can be reached from the first node, including itself."""
    seen = np.zeros(len(step) + 1, dtype=bool)
    new = np.array([0])
    while len(new):
        seen[new] = True
        after = np.unique(step[new])
        new = after[~seen[after] & (after < len(step))]
    return np.flatnonzero(seen)


def _too_large(pattern: str, size: str) -> str:
    return (
        f"pattern {pattern!r} needs {size}, which is too much; use smaller counts (after .* each count doubles the "
        "nodes, nested counts multiply), * and + where max_tokens bounds the length anyway, fewer allowed_tokens, or "
        "put constraint.matches(pattern) into the target"
    )


def _texts(lm: Codec, allowed: Tensor) -> dict[int, str]:
    """The text of each allowed token. Raises SupportError if the texts of tokens do not join to the text of a
    completion."""
    texts = {token: lm.decode([token]) for token in allowed.nonzero().squeeze(1).tolist()}
    texts = {token: x for token, x in texts.items() if x and BROKEN not in x}
    # Test each token beside other tokens, and each ASCII character after each other: "clean-up" writes " ." as ".".
    first, last = ({x[i]: token for token, x in texts.items() if x[i].isascii()} for i in (0, -1))
    beside = [*texts, *reversed(texts), *(z for pair in product(last.values(), first.values()) for z in pair)]
    if lm.decode(beside) != "".join(texts[token] for token in beside):
        raise SupportError(
            f"{lm.name}: in its tokenizer the text of a token depends on the tokens beside it, so a pattern cannot be "
            "read token by token; put constraint.matches(pattern) into the target"
        )
    return texts
