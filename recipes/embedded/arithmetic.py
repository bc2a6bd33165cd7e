"""Sums and differences of one-digit numbers, answered directly or by a chain of steps.

The answer a question gets is right only some of the time; the last sentence repeats the last number of what
came before it, so a good chain of steps is worth finding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

STEP_RIGHT = 0.93
DIRECT_RIGHT = {2: 0.97, 3: 0.20, 4: 0.20, 5: 0.20}
CHAIN_SHARE = {2: 0.50, 3: 0.30, 4: 0.30, 5: 0.30}
ANSWER_FOLLOWS = 0.97
_LENGTHS, _LENGTH_SHARES = (2, 3, 4, 5), (0.33, 0.36, 0.28, 0.03)


@dataclass(frozen=True)
class Problem:
    """A question with the work it was given and the answer that ends it."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]
    work: str
    answer: int

    @property
    def question(self) -> str:
        return f"Question: {expression(self.numbers, self.signs)} = ? Answer:"

    @property
    def ending(self) -> str:
        return f"The answer is {self.answer}."

    @property
    def text(self) -> str:
        return f"{self.question} {self.work}. {self.ending}"

    @property
    def value(self) -> int:
        return evaluate(self.numbers, self.signs)


def apply(left: int, sign: str, right: int) -> int:
    """One step."""
    return left + right if sign == "+" else left - right


def evaluate(numbers: tuple[int, ...], signs: tuple[str, ...]) -> int:
    """The true value of the expression, from left to right."""
    value = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = apply(value, sign, number)
    return value


def expression(numbers: tuple[int, ...], signs: tuple[str, ...]) -> str:
    """The expression as written in a question."""
    return str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))


def _near(value: int, rng: random.Random) -> int:
    return value + rng.choice((-2, -1, -1, -1, 1, 1, 1, 2, 10, -10))


def _wrong(numbers: tuple[int, ...], signs: tuple[str, ...], rng: random.Random) -> int:
    """A plausible error: off by a little, a sign misread, or the last number forgotten."""
    kind = rng.random()
    if kind < 0.45:
        return _near(evaluate(numbers, signs), rng)
    if kind < 0.75:
        flipped = list(signs)
        place = rng.randrange(len(signs))
        flipped[place] = "-" if signs[place] == "+" else "+"
        return evaluate(numbers, tuple(flipped))
    if kind < 0.9 and len(numbers) > 2:
        return evaluate(numbers[:-1], signs[:-1])
    return -evaluate(numbers, signs)


def chain(
    numbers: tuple[int, ...], signs: tuple[str, ...], rng: random.Random | None = None
) -> tuple[str, int]:
    """The steps from left to right and the number they end in; with ``rng`` a step may go wrong."""
    value, steps = numbers[0], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = apply(value, sign, number)
        if rng is not None and rng.random() > STEP_RIGHT:
            result = _near(result, rng)
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    return ", ".join(steps), value


def problem(key: str, length: int | None = None, chained: bool | None = None) -> Problem:
    """The problem of a key; the number of operands and the kind of work may be asked for."""
    rng = random.Random(key)
    drawn = rng.choices(_LENGTHS, _LENGTH_SHARES)[0]
    count = length or drawn
    numbers = tuple(rng.randint(0, 9) for _ in range(count))
    signs = tuple(rng.choice("+-") for _ in range(count - 1))
    use_chain = rng.random() < CHAIN_SHARE[count]
    if chained if chained is not None else use_chain:
        work, result = chain(numbers, signs, rng)
    else:
        right = rng.random() < DIRECT_RIGHT[count]
        result = evaluate(numbers, signs) if right else _wrong(numbers, signs, rng)
        work = str(result)
    answer = result if rng.random() < ANSWER_FOLLOWS else _near(result, rng)
    return Problem(numbers, signs, work, answer)


def document(key: str) -> str:
    """One solved question."""
    return problem(key).text


def facts(key: str) -> str:
    """A list of single steps, all of them right: the tables the other documents rely on."""
    rng = random.Random(key)
    numbers = [
        (rng.randint(-9, 9) + rng.randint(0, 12), rng.choice("+-"), rng.randint(0, 9)) for _ in range(8)
    ]
    return (
        ", ".join(f"{left} {sign} {right} = {apply(left, sign, right)}" for left, sign, right in numbers)
        + "."
    )
