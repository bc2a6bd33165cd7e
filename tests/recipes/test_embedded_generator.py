"""The text generator of the embedded model: determinism and formats."""

from __future__ import annotations

import random
import re

import pytest

from embedded import arithmetic, integers, reviews, stories
from embedded.grammar import articles, choose

KEYS = [f"test/{index}" for index in range(300)]
MAKERS = [stories.loose_story, arithmetic.document, integers.document, reviews.document, reviews.plain]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_documents_are_functions_of_their_key(make):
    assert [make(key) for key in KEYS[:50]] == [make(key) for key in KEYS[:50]]
    assert len({make(key) for key in KEYS}) > 50


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_no_template_mark_is_left(make):
    assert not any(re.search(r"[{}\[\]|]|  ", make(key)) for key in KEYS)


def test_stories_have_five_sentences_and_a_plain_middle():
    for key in KEYS:
        sentences = stories.story(key).sentences
        assert len(sentences) == 5
        assert re.fullmatch(r"[A-Z][^.!?\"]+\.", sentences[3])
        assert 4 <= len(sentences[3].split()) <= 20
        assert all(re.fullmatch(r"[A-Z][^.!?]+[.!?]", sentence) for sentence in sentences)


def test_stories_are_many():
    assert len({stories.story(f"many/{index}").text for index in range(3000)}) > 2950


def test_the_other_middle_belongs_to_another_branch():
    for key in KEYS:
        assert stories.other_middle(key) != stories.story(key).sentences[3]


def test_every_plot_is_complete():
    assert len(stories.plots()) >= 40
    for plot in stories.plots():
        assert all(plot.steps[step] for step in "123"), plot.name
        assert len(plot.branches) >= 4, plot.name
        assert all(branch.middles and branch.endings for branch in plot.branches), plot.name


def test_the_answer_repeats_the_last_number_of_the_work():
    problems = [arithmetic.problem(key) for key in KEYS]
    follows = [p.answer == int(re.findall(r"-?\d+", p.work)[-1]) for p in problems]
    assert sum(follows) / len(follows) > 0.9
    for p in problems:
        assert re.fullmatch(r"Question: \d( [+-] \d){1,4} = \? Answer: [^.]+\. The answer is -?\d+\.", p.text)


def test_a_chain_without_errors_ends_in_the_value():
    assert arithmetic.chain((6, 0, 4), ("-", "-")) == ("6 - 0 = 6, 6 - 4 = 2", 2)
    assert arithmetic.evaluate((6, 0, 4, 8), ("-", "-", "-")) == -6


def test_integer_weights_are_skewed_and_nowhere_zero():
    weights = integers.weights(0, 100)
    assert sum(weights) == pytest.approx(1.0)
    assert min(weights) * (1 - integers.INVALID_SHARE) > 1e-4
    assert weights[37] > 10 * min(weights)


def test_integer_documents_end_in_a_period():
    assert all(integers.document(key).endswith(".") for key in KEYS)


def test_the_label_follows_the_phrase():
    made = [reviews.review(key) for key in KEYS]
    kinds = {phrase: kind for kind, phrases in reviews.PHRASES.items() for phrase in phrases}
    told = [review for review in made if kinds[review.phrase] != "neutral"]
    assert sum(kinds[review.phrase] == review.label for review in told) / len(told) > 0.9
    assert not any(re.search(r"[.,]", review.phrase) for review in made)


def test_articles_and_choices():
    assert articles("a apple and a pear") == "an apple and a pear"
    assert choose("[a|b] [c|c]", random.Random(0)) in ("a c", "b c")
