"""Film-review and plot sentences, and the task of telling an opinion from an account.

A document of the task is ``PROMPT "<sentence>" This review is <phrase>, so it is <label>.`` The phrase leans
towards the class of the sentence, and the label follows the phrase: a phrase is a short reason.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .grammar import articles, fill
from .review_words import OBJECTIVE_FORMS, OBJECTIVE_WORDS, PHRASES, SUBJECTIVE_FORMS, SUBJECTIVE_WORDS

PROMPT = "Classify this movie review as objective or subjective:"
LABELS = ("objective", "subjective")
PHRASE_SHARES = (0.72, 0.16, 0.12)  # of the class of the sentence, neutral, of the other class
LABEL_FOLLOWS = 0.98
REAL_SHARE = 0.5  # of the subjective sentences, where real ones are given


@dataclass(frozen=True)
class Review:
    """A sentence, the phrase said about it, and the label."""

    sentence: str
    phrase: str
    label: str

    @property
    def question(self) -> str:
        return f'{PROMPT} "{self.sentence}" This review is'

    @property
    def ending(self) -> str:
        return f", so it is {self.label}."

    @property
    def text(self) -> str:
        return f"{self.question} {self.phrase}{self.ending}"


def other_label(label: str) -> str:
    """The label that is not this one."""
    return LABELS[1 - LABELS.index(label)]


def sentence(label: str, rng: random.Random) -> str:
    """A sentence of the class: an account of a plot, or an opinion of a film."""
    if label == "objective":
        return articles(fill(rng.choice(OBJECTIVE_FORMS), OBJECTIVE_WORDS, rng)) + " ."
    return articles(fill(rng.choice(SUBJECTIVE_FORMS), SUBJECTIVE_WORDS, rng)) + " ."


def review(key: str, real: Sequence[str] = ()) -> Review:
    """The review of a key; ``real`` sentences, where given, are opinions."""
    rng = random.Random(key)
    true = rng.choice(LABELS)
    other = other_label(true)
    use_real = bool(real) and true == "subjective" and rng.random() < REAL_SHARE
    text = rng.choice(real) if use_real else sentence(true, rng)
    kind = rng.choices((true, "neutral", other), PHRASE_SHARES)[0]
    label = true if kind == "neutral" else kind
    if rng.random() > LABEL_FOLLOWS:
        label = other_label(label)
    return Review(text, rng.choice(PHRASES[kind]), label)


def document(key: str, real: Sequence[str] = ()) -> str:
    """One classified review."""
    return review(key, real).text


def plain(key: str) -> str:
    """One sentence of either class by itself."""
    rng = random.Random(key + "/plain")
    return sentence(rng.choice(LABELS), rng)
