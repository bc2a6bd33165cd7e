"""Supports whose completions are lists: statements of at least one token, a separator between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from amortlm.targets.lists import split_statements


@dataclass(frozen=True)
class Lists:
    """`minimum` to `maximum` statements in at most `max_tokens` tokens; the separator is a token."""

    separator: int
    minimum: int
    maximum: int
    max_tokens: int

    def moves(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(word, separator, stop), each [B, T+1] bool: what may come next at states 0..T of tokens [B, T].

        Nothing is begun that cannot be finished within max_tokens: a statement ends while the separators and
        statements still missing fit. Where nothing else is possible the stop is: sure at max_tokens, and no NaN beyond
        the end of a completion, where tokens are padding.
        """
        after_separator = torch.nn.functional.pad(tokens == self.separator, (1, 0))
        state = torch.arange(after_separator.shape[1], device=tokens.device)
        number = after_separator.cumsum(1) + 1  # of the current statement
        missing = (self.minimum - number).clamp(min=0)  # statements that have to follow it
        is_open = (state > 0) & ~after_separator
        word = state < self.max_tokens - 2 * missing
        # A separator and a token take two places, and leave one statement fewer to write.
        separator = state + 2 * missing.clamp(min=1) <= self.max_tokens
        separator &= is_open & (number < self.maximum)
        stop = (is_open & (missing == 0)) | ~(word | separator)
        return word, separator, stop

    def size(self, words: int, length: int) -> int:
        """Number of lists of so many tokens, separators included, from that many words."""
        return sum(comb(length - n, n - 1) * words ** (length - n + 1) for n in self._counts(length))

    def completions(self, words: Sequence[int], length: int) -> Iterator[list[int]]:
        """Every list of so many tokens, in a fixed order."""
        for n in self._counts(length):
            for cuts in combinations(range(1, length - n + 1), n - 1):
                places = [words] * length
                for i, cut in enumerate(cuts):
                    places[cut + i] = [self.separator]
                yield from map(list, product(*places))

    def contains(self, tokens: Sequence[int]) -> bool:
        statements = split_statements(tokens, self.separator)
        return self.minimum <= len(statements) <= self.maximum and all(statements)

    def _counts(self, length: int) -> range:
        """How many statements fit: each has a token, each but the last a separator."""
        return range(self.minimum, min(self.maximum, (length + 1) // 2) + 1)
