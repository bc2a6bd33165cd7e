"""Diversity: how different the samples of one prompt are.

A completion is a text or a list of tokens. Texts are compared by words (split at white space), token lists by tokens.
Higher is not better: the exact posterior has a diversity between 0 and 1. So read these figures together with the
diagnostics of the posterior. All functions raise DataError for no completions, and for a single text.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain

from amortlm.errors import DataError

Completion = str | Sequence[Hashable]


def num_distinct(completions: Sequence[Completion]) -> int:
    """Number of different completions, 1 to n. White space between words does not count."""
    return len(set(_units(completions)))


def distinct(completions: Sequence[Completion]) -> float:
    """Share of different completions: num_distinct / n, in [1/n, 1]."""
    return num_distinct(completions) / len(completions)


def distinct_ngrams(completions: Sequence[Completion], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams / all n-grams, over all completions; in (0, 1].

    It falls with the number and length of completions, so compare only equal counts. NaN without any n-gram. Raises
    ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n-grams need n of at least 1, not {n}")
    grams = list(chain.from_iterable(_ngrams(units, n) for units in _units(completions)))
    return len(set(grams)) / len(grams) if grams else math.nan


def edit_distance(completions: Sequence[Completion]) -> float:
    """Mean over pairs of samples of Levenshtein distance / length of the longer one, in [0, 1].

    0: all are equal; 1: no pair has a unit in common at an aligned position. NaN for fewer than two completions. O(n^2)
    pairs.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    units = _units(completions)
    n = len(units)
    if n < 2:
        return math.nan
    distances = cdist(units, units, scorer=Levenshtein.normalized_distance)
    return float(distances.sum(dtype="float64")) / (n * (n - 1))  # the diagonal is 0


@dataclass(frozen=True)
class Diversity:
    """The measures of this module, named as their functions; distinct_1, distinct_2: `distinct_ngrams` for n = 1, 2."""

    num_distinct: int
    distinct: float
    distinct_1: float
    distinct_2: float
    edit_distance: float


def diversity(completions: Sequence[Completion]) -> Diversity:
    """Every measure of this module, for the samples of one prompt."""
    return Diversity(
        num_distinct=num_distinct(completions),
        distinct=distinct(completions),
        distinct_1=distinct_ngrams(completions, 1),
        distinct_2=distinct_ngrams(completions, 2),
        edit_distance=edit_distance(completions),
    )


def _units(completions: Sequence[Completion]) -> list[tuple[Hashable, ...]]:
    if isinstance(completions, str):
        raise DataError("diversity compares several completions: give a list of them, not one text")
    if not len(completions):
        raise DataError("diversity of no completions is undefined: give at least one")
    return [tuple(c.split() if isinstance(c, str) else c) for c in completions]


def _ngrams(units: tuple[Hashable, ...], n: int) -> list[tuple[Hashable, ...]]:
    return [units[i : i + n] for i in range(len(units) - n + 1)]
