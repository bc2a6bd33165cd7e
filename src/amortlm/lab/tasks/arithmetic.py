"""Integer arithmetic with steps (Hu et al. 2024, section 4.4): x is a sum of one-digit numbers, z its steps, y the
result. With the calculator as the support's tool, the policy writes the steps and the calculator their results."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from amortlm.errors import DataError
from amortlm.support.tools import Calculator
from amortlm.types import Row

PROMPT = "Question: {x} = ? Answer:"
OF = "{z} The answer is {y}."  # {z} ends with its stop symbol, a full stop
SUPPORT: dict[str, Any] = {"stop": ".", "min_tokens": 1, "max_tokens": 40, "tool": "calculator"}


def questions(count: int, operands: list[int], seed: object) -> list[Row]:
    """Different questions in the form of the paper's: one-digit numbers joined by + and -, with x, y and steps z.

    Raises DataError if there are not so many.
    """
    rng = random.Random(repr(("arithmetic", seed)))
    found: dict[str, Row] = {}
    for _ in range(50 * count):
        if len(found) == count:
            return list(found.values())
        numbers = [rng.randint(0, 9) for _ in range(rng.choice(operands))]
        x = str(numbers[0]) + "".join(f" {rng.choice('+-')} {n}" for n in numbers[1:])
        found[x] = solved(x)
    raise DataError(f"there are no {count} different questions of {operands} operands; ask for fewer")


def solved(x: str) -> Row:
    """The question with its result y and its steps z: " 5 + 9 = 14, 14 - 3 = 11"."""
    first, *rest = re.findall(r"(?:^|[+-] )\d+", x)
    value, steps, calculator = first, [], Calculator()
    for step in rest:
        asked = f"{value} {step} ="
        value = calculator.write(asked).strip()
        steps.append(f"{asked} {value}")
    return {"x": x, "y": value, "z": " " + ", ".join(steps)}


def read_questions(file: Path) -> list[Row]:
    """The paper's files: JSON records with str_query and num_sol. Raises DataError."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        found = [re.fullmatch(r"Question: (.*) = \? Answer:", r["str_query"]) for r in records]
        rows = [solved(m[1]) for m in found if m is not None]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{file}: cannot read arithmetic questions ({type(e).__name__}: {e})") from e
    wrong = [r["x"] for r, given in zip(rows, records, strict=True) if r["y"] != str(given["num_sol"])]
    if wrong:
        raise DataError(f"{file}: the result of {wrong[0]} is not what its steps give")
    return rows
