"""What the tests of structured latents share: supports, their lists by definition, a test of samples."""

from __future__ import annotations

from collections import Counter
from itertools import product

import torch
from stats import g_test

from amortlm import (
    LanguageModel,
    Policy,
    Support,
)
from amortlm.policy.laws import support_completions
from amortlm.targets import Target
from amortlm.types import Rollouts

ROWS = [{"x": "the cat", "y": " ran"}, {"x": "a", "y": " a dog ran"}]
ROW = ROWS[0]
TWO = (" a", " cat")

SUPPORTS = {
    "any number": Support(stop=".", max_tokens=5, allowed_tokens=TWO, separator=","),
    "exactly two": Support(
        stop=".", max_tokens=5, allowed_tokens=TWO, separator=",", min_statements=2, max_statements=2
    ),
    "two or three, long": Support(
        stop=(".", "!"), min_tokens=4, max_tokens=6, allowed_tokens=TWO, separator=",", min_statements=2, max_statements=3
    ),
    "no room to spare": Support(stop=".", max_tokens=5, allowed_tokens=(" a", "s"), separator=",", min_statements=3),
    "padding is the separator": Support(stop=".", max_tokens=4, allowed_tokens=TWO, separator=0, max_statements=2),
    "all tokens": Support(stop=".", max_tokens=3, separator=" the", min_statements=2),
}  # fmt: skip


def plain_lists(support: Support, lm: LanguageModel) -> list[list[int]]:
    """The lists, from the definition: every string of words and separators that splits as it should."""
    separator = lm.token_id(support.separator)
    words = support.allowed_tokens or [
        i for i in range(len(lm.tokenizer)) if i not in (0, 1, lm.token_id("."), separator)
    ]
    high = support.max_statements or support.max_tokens
    out = []
    for length in range(max(support.min_tokens, 1), support.max_tokens + 1):
        for z in product([lm.token_id(w) for w in words] + [separator], repeat=length):
            runs = "".join("|" if t == separator else "w" for t in z).split("|")
            if all(runs) and support.min_statements <= len(runs) <= high:
                out.append(list(z))
    return out


def log_q(policy: Policy, completions: list[list[int]]) -> torch.Tensor:
    rollouts = policy.rollouts([ROW], [completions])
    with torch.no_grad():
        return policy.evaluate(rollouts).final(rollouts.lengths).double()


def p_value(policy: Policy, drawn: Rollouts, log_p: torch.Tensor) -> float:
    completions = support_completions(policy)
    counts = Counter(map(tuple, drawn.completions()))
    assert set(counts) <= set(map(tuple, completions)), "a sample is outside the support"
    return g_test(torch.tensor([counts[tuple(z)] for z in completions]), log_p.exp())


def two_latents(lm: LanguageModel) -> Target:
    return lm.log_prob("{z1}{z2}{y}", given="{x}")
