"""The targets: posteriors over supports small enough to enumerate, stated as data, and their exact truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch

from amortlm import LanguageModel, Policy, Support, Target
from amortlm.inference.exact import enumerate_posterior
from amortlm.targets.functions import Trust
from amortlm.targets.spec import target_from_spec
from amortlm.types import Row

from .laws import Array, Space

ROW: Row = {}
STORY = "Once upon a time there was a"
TOM = "Tom was"
LIVED = "Far away, in a small house by the sea, there lived a"
FOREST = "In the dark forest Tom was afraid of the"
DOG = "The dog was"
COLD = "The weather was cold. Tom felt"
SHORT = " He cried."
LONG = " His friend gave him a warm coat, and they played in the snow until it was dark."
PEOPLE = (
    "little big brave young happy small proud old tall sad kind white lonely girl boy man bird bear farmer baby dog "
    "cat rabbit who and named"
)
FEELINGS = (
    "very so sad happy sick tired scared excited nervous hungry lonely proud brave afraid bad sorry and not but "
    "too"
)
FEW = "very so sad happy sick tired scared excited nervous hungry afraid bad sorry and"


@dataclass(frozen=True)
class Case:
    """One posterior. words: what the support may write, each with a space before it and one token long; pattern: what
    the support knows of the target's constraint."""

    name: str
    prompt: str
    target: Sequence[dict[str, Any]]
    words: str = PEOPLE
    max_tokens: int = 3
    pattern: str | None = None

    @property
    def finished_only(self) -> bool:
        """Does a term judge nothing but finished text?"""
        return any("verifier" in term for term in self.target)

    def support(self) -> Support:
        words = [f" {word}" for word in self.words.split()]
        return Support(
            stop=".", min_tokens=1, max_tokens=self.max_tokens, allowed_tokens=words, pattern=self.pattern
        )

    def build(self, lm: LanguageModel) -> Target:
        # A copy: building takes the function out of a verifier's mapping.
        return target_from_spec([dict(term) for term in self.target], lm, Trust([__name__]))


def model(given: str, of: str = "{z}", **more: Any) -> dict[str, Any]:
    return {"log_prob": {"of": of, "given": given}, **more}


def alliteration(texts: list[str], rows: list[Row]) -> list[float]:
    """2 nats for each pair of neighbouring words that begin with the same letter."""
    return [2.0 * sum(a[0] == b[0] for a, b in _neighbours(text)) for text in texts]


def _neighbours(text: str) -> list[tuple[str, str]]:
    words = text.split()
    return list(pairwise(words))


VERIFIER = {"verifier": {"function": "benchmarks.posteriors.cases:alliteration"}}
BOTH = r"(.* )?(farmer( .*)? boy|boy( .*)? farmer)( .*)?"
BEASTS = r"(bear|bird) (sad|old|proud) .*"
CASES = [
    Case("tempered-0.5", STORY, [model(STORY, temperature=0.5)]),
    Case("tempered-0.8", STORY, [model(STORY, temperature=0.8)]),
    Case("tempered-1.5", STORY, [model(STORY, temperature=1.5)]),
    Case("infill-short", TOM, [model(TOM, "{z}" + SHORT)], FEELINGS),
    Case("infill-long", COLD, [model(COLD, "{z}" + LONG)], FEW),
    Case("contains-common", STORY, [model(STORY), {"contains": ["brave"]}]),
    Case("contains-rare", STORY, [model(STORY), {"contains": ["farmer", "boy"]}]),
    Case("contains-rare-told", STORY, [model(STORY), {"contains": ["farmer", "boy"]}], pattern=BOTH),
    Case("regex-common", STORY, [model(STORY), {"matches": r"(big|small|tall) .*"}]),
    Case("regex-rare", STORY, [model(STORY), {"matches": BEASTS}]),
    Case("regex-rare-told", STORY, [model(STORY), {"matches": BEASTS}], pattern=BEASTS),
    Case("contrastive", DOG, [model(DOG, weight=2.0), model(TOM, weight=-1.0)], FEELINGS),
    Case("two-mode", STORY, [model(STORY), {"matches": r"(lonely|old) .*"}]),
    Case("verifier", STORY, [model(STORY), VERIFIER]),
    # Held out: two families that no setting, default or method was chosen on.
    # What two contexts agree on.
    Case("blend-near", STORY, [model(STORY), model(LIVED)]),
    Case("blend-far", STORY, [model(STORY), model(FOREST)]),
    # Not regular: no automaton can know them, so they stay terms.
    Case("echo-common", STORY, [model(STORY), {"matches": r"(\w)\w* (.* )?\1\w*"}]),
    Case("echo-rare", STORY, [model(STORY), {"matches": r"(\w)\w* (?!\1)\w* \1\w*"}]),
]
HELD_OUT = ("blend-near", "blend-far", "echo-common", "echo-rare")
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Truth:
    """Every string of a case's words: log R and p [M] (R = 0 outside a pattern), log Z; the space they fill."""

    space: Space
    completions: list[list[int]]
    log_r: Array
    p: Array
    log_z: float


def truth_of(target: Target, policy: Policy, row: Row = ROW) -> Truth:
    """By enumeration: one score for each completion."""
    exact, support = enumerate_posterior(target, policy.support, row), policy.support
    space = Space(int(support.allowed.sum()), support.min_tokens, support.max_tokens)
    strings = [z for n in range(space.min_tokens, space.max_tokens + 1) for z in words_of(policy, n)]
    held = dict(zip(map(tuple, exact.completions), exact.log_p.tolist(), strict=True))
    log_p = np.array([held.get(z, -np.inf) for z in strings])
    return Truth(space, [list(z) for z in strings], log_p + exact.log_z, np.exp(log_p), exact.log_z)


def words_of(policy: Policy, length: int) -> list[tuple[int, ...]]:
    """All strings of so many allowed tokens, inside a pattern or not, in the order of a `Space`."""
    return list(product(policy.support.allowed.nonzero().squeeze(1).tolist(), repeat=length))


@torch.no_grad()
def policy_law(policy: Policy, row: Row = ROW) -> Array:
    """[M] log q of every string, as `policy_log_probs`, from one pass over those that have a next token.

    All prefixes of a string of max_tokens - 1 tokens get their next-token probabilities at once.
    """
    support, passes = policy.support, policy.passes
    choices = support.allowed.nonzero().squeeze(1)
    longest = words_of(policy, support.max_tokens - 1)
    tokens = torch.tensor(longest, dtype=torch.long).reshape(len(longest), -1)
    prefix = passes.encode(policy.encode_rows([row]))
    width = len(choices)
    levels: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for start in range(0, len(tokens), 512):
        part = tokens[start : start + 512]
        logits = passes.state_logits(prefix, torch.zeros(len(part), dtype=torch.long), part)
        node = support.nodes(part)
        for depth in range(support.max_tokens):
            t = torch.full((len(part),), depth)
            next_ = support.step(logits[:, depth].double(), t, node[:, depth])
            levels.setdefault(depth, []).append((next_.log_q[:, choices], next_.log_stop))
    log_prefix, out = torch.zeros(1, dtype=torch.float64), []
    for depth in range(support.max_tokens + 1):
        if depth < support.max_tokens:
            every = width ** (support.max_tokens - 1 - depth)  # strings that share this prefix stand together
            step, stop = (torch.cat(parts)[::every] for parts in zip(*levels[depth], strict=True))
        else:
            stop = torch.zeros(len(log_prefix), dtype=torch.float64)
        if depth >= support.min_tokens:
            out.append(log_prefix + stop)
        if depth < support.max_tokens:
            log_prefix = (log_prefix[:, None] + step).flatten()
    return torch.cat(out).numpy()
