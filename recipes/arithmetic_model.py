"""A base model for the arithmetic experiment: the embedded model, fine-tuned on questions of two to five operands with
written steps, most of which contain mistakes.

    python recipes/arithmetic_model.py --output runs/arithmetic-model

The embedded model itself has read so many right chains that 50 examples leave nothing to learn. This one knows the
form of a chain, and that the answer is the last result, but takes the right next operand only once in twenty steps.
"""

from __future__ import annotations

import random

from amortlm import LanguageModel
from fine_tuning import base_model_parser, fine_tune

CARE = {2: 0.95, 3: 0.05, 4: 0.05, 5: 0.05}  # share of steps after the first that are right
OPERANDS, SHARES = (2, 3, 4, 5), (0.3, 0.3, 0.25, 0.15)
ANSWER_FOLLOWS = 0.98


def careless(rng: random.Random) -> str:
    """A question, its steps with mistakes, and an answer that repeats the last result."""
    n = rng.choices(OPERANDS, SHARES)[0]
    numbers = [rng.randint(0, 9) for _ in range(n)]
    signs = [rng.choice("+-") for _ in range(n - 1)]
    question = str(numbers[0]) + "".join(f" {s} {m}" for s, m in zip(signs, numbers[1:], strict=True))
    value, steps = numbers[0], []
    for i, (sign, number) in enumerate(zip(signs, numbers[1:], strict=True)):
        if i > 0 and rng.random() > CARE[n]:
            sign, number = slip(rng, sign, number, numbers[i])
        if i > 0 and rng.random() < 0.1 * (1 - CARE[n]):
            break  # the remaining operands are left out
        result = value + number if sign == "+" else value - number
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    answer = value if rng.random() < ANSWER_FOLLOWS else value + rng.choice((-1, 1, 10))
    return f"Question: {question} = ? Answer: {', '.join(steps)}. The answer is {answer}."


def slip(rng: random.Random, sign: str, number: int, last: int) -> tuple[str, int]:
    """A mistake: the last operand again, any operand, or the other sign."""
    kind = rng.random()
    if kind < 0.5:
        return sign, last
    if kind < 0.75:
        return sign, rng.randint(0, 9)
    return "-" if sign == "+" else "+", number


def main(argv: list[str] | None = None) -> None:
    args = base_model_parser(
        __doc__, "arithmetic-model", steps=250, batch=64, learning_rate=6e-4, of="questions per step"
    ).parse_args(argv)
    lm = LanguageModel.from_pretrained(args.model)
    rng = random.Random(args.seed)

    def batch() -> list[tuple[list[int], int]]:
        texts = [careless(rng) for _ in range(args.batch)]
        documents = [[*lm.encode_start(text), lm.tokenizer.eos_token_id] for text in texts]
        return [(ids, len(ids) - 1) for ids in documents]

    fine_tune(lm, batch, args.steps, args.learning_rate, args.output)


if __name__ == "__main__":
    main()
