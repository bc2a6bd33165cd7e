"""What the tests of the genlm bridge share: small supports, targets of every kind, and a way to wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

from amortlm import LanguageModel, Support, constraint, verifier
from amortlm.targets.base import Target

ROW = {"x": "the dog", "y": " ran"}
TOKENS = (" a", " cat", "s")


def support(low: int = 0, **more: Any) -> Support:
    return Support(stop=(".", "!"), min_tokens=low, max_tokens=3, allowed_tokens=TOKENS, **more)


def infilling(lm: LanguageModel) -> Target:
    return lm.log_prob("{z}{y}", given="{x}") / 2


def finished(texts: list[str], rows: list[Any]) -> list[float]:
    """Judges finished text only, R = 0 unless it has an s."""
    return [-0.7 * len(text) if "s" in text else -math.inf for text in texts]


TARGETS: dict[str, Callable[[LanguageModel], Target]] = {
    "infilling": infilling,
    "hard": lambda lm: infilling(lm) + constraint.contains("cat"),
    "finished": lambda lm: verifier(finished),
    "both": lambda lm: infilling(lm) + verifier(finished),
}
PAIRS = [("infilling", "free"), ("hard", "long"), ("finished", "free"), ("both", "lists")]
SUPPORTS = {"free": support(), "long": support(2), "lists": support(separator="\n", min_statements=1)}


def made(name: str, lm: LanguageModel) -> Target:
    return TARGETS[name](lm).bind(lm)


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def context(potential: Any, ids: list[int]) -> list[Any]:
    by_id = {t.token_id: t for t in potential.vocab}
    return [by_id[i] for i in ids]


def prefixes(potential: Any, completions: list[list[int]]) -> list[list[Any]]:
    unique = dict.fromkeys(tuple(z[:t]) for z in completions for t in range(len(z) + 1))
    return [context(potential, list(z)) for z in unique]
