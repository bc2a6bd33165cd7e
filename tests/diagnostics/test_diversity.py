"""Diversity measures against values counted by hand."""

import math
from dataclasses import asdict

import pytest

from amortlm.diagnostics.diversity import (
    distinct,
    distinct_ngrams,
    diversity,
    edit_distance,
    num_distinct,
)
from amortlm.errors import DataError

TEXTS = ["a dog ran", "a dog ran", "the dog ran", "a cat"]


def test_distinct_counts_completions():
    assert num_distinct(TEXTS) == 3
    assert distinct(TEXTS) == 0.75


def test_whitespace_does_not_make_texts_differ():
    assert num_distinct(["a dog", " a  dog "]) == 1


def test_distinct_ngrams_by_hand():
    # 11 words, 5 different; 7 bigrams: "a dog" x2, "dog ran" x3, "the dog", "a cat"
    assert distinct_ngrams(TEXTS, 1) == pytest.approx(5 / 11)
    assert distinct_ngrams(TEXTS, 2) == pytest.approx(4 / 7)


def test_edit_distance_by_hand():
    # pairs: 0, 1/3, 2/3, 1/3, 2/3, and "the dog ran" - "a cat" shares nothing: 1
    assert edit_distance(TEXTS) == pytest.approx((0 + 1 / 3 + 2 / 3 + 1 / 3 + 2 / 3 + 1) / 6, abs=1e-6)


def test_token_lists_equal_their_words():
    ids = {word: i for i, word in enumerate(["a", "dog", "ran", "the", "cat"])}
    tokens = [[ids[w] for w in text.split()] for text in TEXTS]
    assert asdict(diversity(tokens)) == pytest.approx(asdict(diversity(TEXTS)))


@pytest.mark.parametrize(("texts", "expected"), [(["x y"] * 5, 0.0), (["a b", "c d", "e f"], 1.0)])
def test_extremes_of_the_edit_distance(texts, expected):
    assert edit_distance(texts) == expected


def test_empty_completions_count_as_equal():
    assert edit_distance([[], []]) == 0.0
    assert num_distinct([[], [], [1]]) == 2


def test_undefined_values_are_nan():
    assert math.isnan(edit_distance(["one"]))
    assert math.isnan(distinct_ngrams(["one", "two"], 2))


@pytest.mark.parametrize("bad", [[], "one text"])
def test_errors_name_what_is_needed(bad):
    with pytest.raises(DataError, match="give"):
        diversity(bad)


def test_ngrams_need_a_positive_n():
    with pytest.raises(ValueError, match="at least 1"):
        distinct_ngrams(TEXTS, 0)
