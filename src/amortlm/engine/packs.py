"""What goes through a model at once: how many texts fit the memory setting, and which may share a pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from amortlm.engine.memory import MASK, Memory, Sizes
from amortlm.engine.prefix import Prefix
from amortlm.engine.shards import shards_of

ARGUMENTS = ("attention_mask", "position_ids", "logits_to_keep")
MIN_SAVED = 128  # tokens of padding that cost about as much as the fixed work of one more pass on a CPU


@dataclass(frozen=True)
class Sharing:
    """The kinds of passes that are exact for a model: they give the log-probabilities of plain passes of single texts.

    steps    a cached prompt is continued token by token (without gradient)
    spans    a cached prompt is continued by several tokens at once
    packed   several continuations are side by side after a cached prompt, under a 4-D mask
    window   the longest text, in tokens, for which packed is exact: the reach of the narrowest attention layer
    longest  the longest text, in tokens, for which steps and spans are exact; None: no limit
    switch   the length in tokens beyond which a text has other rotary embeddings (LongRoPE); None: none
    """

    steps: bool = True
    spans: bool = True
    packed: bool = True
    window: int | None = None
    longest: int | None = None
    switch: int | None = None


class Packs:
    """How many texts of one model go at once, and which may go together."""

    def __init__(self, model: Any, sharing: Sharing, memory: Memory | None = None):
        self.model, self.sharing, self.memory = model, sharing, memory or Memory()

    def fit(self, each: float, held: float = 0) -> int:
        """How many texts of `each` bytes fit into the memory setting beside what is held; one always goes."""
        return max(1, int((self.memory.mb * 2**20 - held) // each))

    def share(self, each: float, held: float = 0) -> float:
        """What share `each` bytes are of the memory setting, less what is held; infinite where nothing is left."""
        left = self.memory.mb * 2**20 - held
        return each / left if left > 0 else math.inf

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.model)

    def scored_bytes(self, prompt: int, states: int) -> int:
        """Bytes of a completion in the pass that gives the logits of `states` states, behind `prompt` tokens."""
        if self.sharing.spans and self._shares([prompt + states]):
            return self.sizes.text(states, past=prompt)
        return self._whole_bytes(prompt + states, states)

    def written_bytes(self, prompt: int, tokens: int, kept: bool = False) -> int:
        """Bytes of a completion of up to `tokens` tokens while it is written. kept: its beginning is given."""
        beside = 4 * 2 + 2  # of a logit: those that are legal and log q in float32, and what is legal
        if not (self.sharing.steps and self._shares([prompt + tokens])):
            return self._whole_bytes(prompt + tokens, 1, beside)
        # What is given is encoded into a cache, of which the writer makes its own.
        twice = (prompt + tokens) * self.sizes.cache if kept else 0
        return twice + self.sizes.text(1, past=prompt + tokens, extra=beside)

    def _whole_bytes(self, tokens: int, logits: int, beside: int = 0) -> int:
        """Of a whole text. The logits that are asked for are copied out of those that the model gives."""
        given = logits if "logits_to_keep" in self._accepts else tokens
        copied = logits * self.sizes.vocabulary * (self.sizes.logit + beside)
        return copied + self.sizes.text(tokens, logits=given)

    def branch_bytes(self, past: int, width: int) -> int:
        """Bytes of `width` tokens of branches behind a cache over `past` tokens, their mask among them."""
        return self.sizes.text(width, past=past) + 2 * MASK * width * (past + width)

    def encoded_bytes(self, prompt: int) -> int:
        """Bytes of a prompt while it is encoded."""
        return self.sizes.text(prompt, logits=1 if "logits_to_keep" in self._accepts else prompt)

    def blocks(self, prompts: Sequence[Sequence[int]]) -> list[slice]:
        """Consecutive prompts to encode at once; all of them where gradients flow. A quarter of the memory holds their
        cache, so that the rest is for completions."""
        out, first, width = [], 0, 0
        for i, prompt in enumerate(prompts):
            width = max(width, len(prompt))
            each = max(self.encoded_bytes(width), 4 * width * self.sizes.cache)
            if i > first and i - first >= self.fit(each) and not torch.is_grad_enabled():
                out.append(slice(first, i))
                first, width = i, len(prompt)
        return [*out, slice(first, len(prompts))]

    def groups(self, prefix: Prefix, lengths: Tensor) -> Iterator[Tensor]:
        """The completions of lengths [B] behind these prompts, in groups of similar length for a pass over their
        states; where gradients flow they are not cut for memory."""
        together = [torch.arange(len(lengths), device=lengths.device)]
        for group in together if self._makes_one_pass() else length_groups(lengths):
            while len(group) > 0:
                each = self.scored_bytes(prefix.longest, int(lengths[group[0]]) + 1)
                size = len(group) if torch.is_grad_enabled() else self.fit(each, prefix.held)
                yield group[:size]
                group = group[size:]

    def _makes_one_pass(self) -> bool:
        """The way back through a sharded model gathers weights, too, and so must be as many passes in each process."""
        return torch.is_grad_enabled() and shards_of(self.model) is not None

    def _shares(self, lengths: Sequence[int]) -> bool:
        """May texts of these lengths, in tokens, share a cache and a batch?"""
        found = self.sharing
        if not (found.steps or found.spans) or len(self._sides([n - 1 for n in lengths])) > 1:
            return False
        return found.longest is None or max(lengths) <= found.longest

    def _sides(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rows in groups that may share a pass: LongRoPE chooses the embedding of a batch by its longest row, so
        rows below and above the switch are separated."""
        if self.sharing.switch is None:
            return [list(range(len(lengths)))]
        long = [n > self.sharing.switch for n in lengths]
        parts = [[b for b, x in enumerate(long) if x == side] for side in (False, True)]
        return [rows for rows in parts if rows]

    @cached_property
    def _accepts(self) -> frozenset[str]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        named = frozenset(inspect.signature(base.forward).parameters)
        # A wrapper without named arguments passes all of them on.
        return named if "input_ids" in named else frozenset(ARGUMENTS)


def length_groups(lengths: Tensor) -> list[Tensor]:
    """The rows 0..B-1 in groups of similar length, longest first, so that passes have little padding.

    One group on a GPU, where one more pass costs more than padding.
    """
    by_length, order = lengths.sort(descending=True, stable=True)
    if lengths.device.type != "cpu" or len(lengths) < 2:
        return [order]
    size = torch.arange(1, len(lengths))
    saved = (by_length[0] - by_length[1:]) * (len(lengths) - size)
    cut = int(saved.argmax()) + 1
    if saved[cut - 1] < max(MIN_SAVED, 0.1 * int(by_length[0]) * len(lengths)):
        return [order]
    head, tail = order[:cut], order[cut:]
    return [part[g] for part in (head, tail) for g in length_groups(lengths[part])]
