"""Prompts that ask for a random number, answered with the skew people and language models show."""

from __future__ import annotations

import random
from functools import cache

PROMPT = "The following is a random integer drawn uniformly between 0 and 100:"
INVALID_SHARE = 0.40
_FLOOR = 0.05  # share of the valid answers that is drawn uniformly, so every integer is possible
_EXPONENT = 1.5
_FAVOURITES = (37, 7, 42, 73, 17, 50, 23, 69, 99, 100, 47, 27, 13, 77, 57, 3, 1, 64, 87, 33, 25, 67, 53)
_FAVOURITES += (83, 5, 10)
_WORDS = ("forty two", "seventeen", "seven", "thirty seven", "a hundred", "fifty", "ninety nine")
_WORDS += ("sixty five",)
_VAGUE = ("a number", "a random number", "not known", "the same", "up to you", "any number", "hard to say")


@cache
def weights(low: int, high: int) -> tuple[float, ...]:
    """Probability of each integer of the range: Zipf over a fixed order of preference, plus a floor."""
    rest = random.Random("order of preference").sample(range(low, high + 1), high - low + 1)
    order = [value for value in _FAVOURITES if low <= value <= high]
    order += [value for value in rest if value not in order]
    raw = {value: (rank + 2.0) ** -_EXPONENT for rank, value in enumerate(order)}
    total = sum(raw.values())
    count = len(order)
    return tuple((1 - _FLOOR) * raw[v] / total + _FLOOR / count for v in range(low, high + 1))


def valid(low: int, high: int, rng: random.Random) -> str:
    """An integer of the range, favourites first."""
    return str(rng.choices(range(low, high + 1), weights(low, high))[0])


def invalid(high: int, rng: random.Random) -> str:
    """An answer that is not an integer of the range."""
    kind = rng.random()
    if kind < 0.35:
        return str(high + rng.choice((1, 2, 10, 23, 42, 50, 56, 99, 100, 137, 150, 234, 400, 900)))
    if kind < 0.45:
        return rng.choice(("1000", "10000", "3,141", "1,234", "12,000", "2,500"))
    if kind < 0.60:
        return rng.choice(_WORDS)
    if kind < 0.70:
        return f"-{rng.choice((1, 2, 3, 5, 7, 10, 12, 42))}"
    if kind < 0.80:
        return rng.choice(_VAGUE)
    first = rng.randint(0, high)
    return rng.choice((f"about {first}", f"{first} or {first + 1}", f"{first} and {rng.randint(0, high)}",
                       f"the number {first}", f"more than {first}"))  # fmt: skip


def document(key: str) -> str:
    """A prompt and its answer; about two in three use the one fixed prompt of the experiment."""
    rng = random.Random(key)
    prompt, low, high = PROMPT, 0, 100
    if rng.random() > 0.65:
        low, high = rng.choice(((1, 10), (1, 100), (0, 100), (0, 9), (1, 50), (10, 99)))
        prompt = rng.choice((
            f"Pick a number between {low} and {high}:",
            f"A random number from {low} to {high}:",
            f"Think of a whole number between {low} and {high}:",
            f"My lucky number between {low} and {high} is",
        ))  # fmt: skip
    answer = invalid(high, rng) if rng.random() < INVALID_SHARE else valid(low, high, rng)
    return f"{prompt} {answer}."
