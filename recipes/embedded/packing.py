"""Rows of documents for training.

A row is filled with documents in the order in which they come, and the last one is cut where the row ends. No
choice looks at the length of a document: if short documents were used to fill gaps, what a document says would
depend on where it stands in a row, and a model that reads one document at a time would learn the wrong odds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .corpus import SHARES, Corpus

PARTS = list(SHARES)


class Packer:
    """Fills rows of ``length + 1`` tokens (inputs and targets overlap by one)."""

    def __init__(
        self,
        corpus: Corpus,
        encode: Callable[[str], list[int]],
        lengths: dict[str, float],
        counts: dict[str, int],
    ) -> None:
        self.encode = encode
        self.counts = dict.fromkeys(PARTS, 0) | counts
        self._documents: Iterator[tuple[str, str]] = corpus.stream(lengths, self.counts)

    def row(self, length: int) -> tuple[list[int], list[int]]:
        """Tokens and part numbers of one row."""
        tokens: list[int] = []
        parts: list[int] = []
        while len(tokens) <= length:
            part, text = next(self._documents)
            self.counts[part] += 1
            piece = self.encode(text)
            tokens += piece
            parts += [PARTS.index(part)] * len(piece)
        return tokens[: length + 1], parts[: length + 1]

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and part numbers, both ``[rows, length + 1]``."""
        packed = [self.row(length) for _ in range(rows)]
        return torch.tensor([row[0] for row in packed]), torch.tensor([row[1] for row in packed])


def mean_lengths(corpus: Corpus, encode: Callable[[str], list[int]], sample: int = 300) -> dict[str, float]:
    """Mean number of tokens of a document of each part."""
    return {
        part: sum(len(encode(corpus.document(part, index))) for index in range(sample)) / sample
        for part in PARTS
    }
