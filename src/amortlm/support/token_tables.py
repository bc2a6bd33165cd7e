"""From an automaton over characters to the tables of one over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amortlm.support.spelling import Spelling
from amortlm.text.characters import REPLACEMENT, Ints, Utf8

MAX_CELLS = 2**24  # cells of the table of nodes by classes of tokens: 128 MiB


class TooLargeError(Exception):
    """Says what is too large."""


class Characters(NamedTuple):
    """An automaton over characters: it begins at node 0 of S, and S is the dead end.

    table    [S, K] the node after a character of each kind
    accepts  [S] bool: may a text end at the node?
    kind     [code points] the kind of each character
    """

    table: Ints
    accepts: NDArray[np.bool_]
    kind: Ints


def token_tables(characters: Characters, written: Spelling, size: int) -> dict[str, Tensor]:
    """The tables step [S, C], token_class [size] and accepts [S] of an `Automaton`.

    The action of a token maps each state to the state after the token, and tokens of one action share a class. A state
    is a node, and, if tokens hold parts of characters, what is left over of one (`Utf8`). Raises TooLargeError.
    """
    nodes = len(characters.table)
    actions = _Actions(characters.table)
    acts = {
        text: actions.of(characters.kind[[ord(c) for c in text]].tolist())
        for text in set(written.texts.values())
    }
    used = sorted({0, *acts.values()})
    ends = np.append(characters.accepts, False)
    lifted = np.stack([actions.known[a] for a in used])
    rank = {a: i for i, a in enumerate(used)}
    token_class = np.zeros(size, dtype=np.int64)
    for token, text in written.texts.items():
        token_class[token] = rank[acts[text]]
    if written.parts:
        lifted, ends, of_parts = _with_parts(characters, ends, lifted, written.parts.values())
        token_class[list(written.parts)] = len(used) + np.array(of_parts)
        dead = np.arange(len(ends)) % (nodes + 1) == nodes
    else:
        dead = np.arange(nodes + 1) == nodes
    return _trimmed(lifted, ends & ~dead, dead, token_class)


class _Actions:
    """Actions of texts on the S + 1 nodes, each once. known[0] leads to the dead end, known[1] changes nothing."""

    def __init__(self, table: Ints):
        self.dead = len(table)
        self.moves = np.vstack([table, np.full((1, table.shape[1]), self.dead)]).T
        self.known = [np.full(self.dead + 1, self.dead), np.arange(self.dead + 1)]
        self._number = {action.tobytes(): i for i, action in enumerate(self.known)}
        self._after: dict[tuple[int, int], int] = {}

    def of(self, kinds: Iterable[int]) -> int:
        """The number of the action of a text, from the kinds of its characters."""
        action = 1
        for kind in kinds:
            if action == 0:
                break
            action = self._moved(action, kind)
        return action

    def _moved(self, action: int, kind: int) -> int:
        """The action of a text with one more character."""
        if (action, kind) not in self._after:
            leads = self.moves[kind][self.known[action]]
            found = self._number.setdefault(leads.tobytes(), len(self.known))
            self._after[action, kind] = found
            if found == len(self.known):
                self.known.append(leads)
            _check(self.dead, len(self.known))
        return self._after[action, kind]


def _with_parts(
    characters: Characters, ends: NDArray[np.bool_], actions: Ints, parts: Iterable[bytes]
) -> tuple[Ints, NDArray[np.bool_], list[int]]:
    """The actions [n, S+1] of texts, and then those of parts, on the P * (S+1) states (left over, node); which states a
    text may end at; and the number of each part's action among those of parts."""
    width, utf8 = len(ends), Utf8.of_kinds(characters.kind)
    moves = np.vstack(
        [_Actions(characters.table).moves, np.arange(width)]
    )  # the last, for NONE, changes nothing
    size = len(utf8.after) * width
    _check(size, len(actions))
    states = np.arange(size)
    left, node = states // width, states % width
    replaced = moves[characters.kind[ord(REPLACEMENT)]]
    closed = np.where(
        left > 0, replaced[node], node
    )  # what is left over when a text ends or another one follows
    distinct: dict[bytes, int] = {}
    found: list[Ints] = []
    of_parts = []
    for part in parts:
        at, now = left, node
        for byte in part:
            now = moves[utf8.second[at, byte], moves[utf8.first[at, byte], now]]
            at = utf8.after[at, byte]
        action = at * width + now
        key = action.tobytes()
        if key not in distinct:
            distinct[key] = len(found)
            found.append(action)
        of_parts.append(distinct[key])
        _check(size, len(actions) + len(found))
    return np.concatenate([actions[:, closed], np.stack(found)]), ends[closed], of_parts


def _trimmed(
    actions: Ints, ends: NDArray[np.bool_], dead: NDArray[np.bool_], token_class: Ints
) -> dict[str, Tensor]:
    """The tables, of the states alone that can be reached and from which a text can end."""
    step = np.ascontiguousarray(actions.T)  # [states, C]
    step[dead] = np.flatnonzero(dead)[0]
    reached = _closure(step, np.array([0]))
    step, ends = step[reached], ends[reached]
    number = np.full(len(dead), -1)
    number[reached] = np.arange(len(reached))
    step = number[step]
    alive = ends.copy()
    while (more := alive | alive[step].any(1)).sum() > alive.sum():
        alive = more
    alive[0] = True
    kept = np.flatnonzero(alive)
    number = np.full(len(alive), len(kept))
    number[kept] = np.arange(len(kept))
    step, ends = number[step[kept]], ends[kept]
    columns, place = np.unique(step, axis=1, return_inverse=True)
    used, token_class = np.unique(place.ravel()[token_class], return_inverse=True)
    _check(len(kept), len(used))
    return {
        "step": torch.from_numpy(np.ascontiguousarray(columns[:, used])).int(),
        "token_class": torch.from_numpy(token_class.ravel()).int(),
        "accepts": torch.from_numpy(ends),
    }


def _check(nodes: int, actions: int) -> None:
    if nodes * actions > MAX_CELLS:
        raise TooLargeError(f"{nodes:,} nodes and more than {actions - 1:,} kinds of tokens")


def _closure(step: Ints, start: Ints) -> Ints:
    """The states that can be reached from some states, including themselves, in order."""
    seen = np.zeros(len(step), dtype=bool)
    new = start
    while len(new):
        seen[new] = True
        after = np.unique(step[new])
        new = after[~seen[after]]
    return np.flatnonzero(seen)
