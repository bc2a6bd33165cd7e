"""Supports whose completions are lists: statements of at least one token, with a separator token between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.support.automaton import Automaton


@dataclass(frozen=True)
class Lists:
    """`minimum` to `maximum` statements. separator: the id of the token between them."""

    separator: int
    minimum: int
    maximum: int

    def automaton(self, words: Tensor, min_tokens: int, max_tokens: int) -> Automaton:
        """The automaton of these lists. words [V] bool: the tokens that a statement may consist of.

        Node 2n: n statements are finished, and the next one has no token yet. Node 2n + 1: it has at least one token.
        """
        nodes = torch.arange(2 * self.maximum)
        step = torch.full((len(nodes), 3), len(nodes))  # class 0, tokens that are never written: a dead end
        step[:, 1] = nodes | 1
        step[1:-1:2, 2] = nodes[2::2]
        classes = words.long()
        classes[self.separator] = 2
        accepts = (nodes % 2 == 1) & (nodes >= 2 * self.minimum - 1)
        return Automaton(step, classes, accepts, min_tokens, max_tokens)


def split_statements(tokens: Sequence[int], separator: int) -> list[list[int]]:
    """The token lists between the separators: [a SEP b c] -> [[a], [b, c]]. No tokens give no statement."""
    out: list[list[int]] = [[]]
    for token in tokens:
        if token == separator:
            out.append([])
        else:
            out[-1].append(token)
    return out if tokens else []
