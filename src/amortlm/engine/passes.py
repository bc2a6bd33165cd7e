"""Forward passes of a causal LM in which a prompt is encoded once for all its completions.

A prompt of P tokens is split: its first P-1 tokens fill a key/value cache (one row per prompt), its last token starts
every completion. So one pass over `[last, z_1 .. z_T]` gives the logits of all T+1 states.

If a model cannot share a prompt exactly (`Sharing`, determined in `amortlm.engine.exactness`), whole texts are passed,
padded on the right, with tokens as the only input. This is exact for every causal architecture.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from amortlm import versions
from amortlm.engine.memory import MASK, Memory, Sizes
from amortlm.support.log_probs import at_once


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


@dataclass(frozen=True)
class Prefix:
    """N encoded prompts.

    cache    over the first P-1 tokens, padded on the left; None if P = 1 or if prompts are not shared
    mask     [N, P-1] bool: False at padding
    last     [N] long: the last token of each prompt
    prompts  the token lists
    shared   may the cache be used?
    """

    cache: Cache | None
    mask: Tensor
    last: Tensor
    prompts: Sequence[Sequence[int]]
    shared: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.mask.shape[1] + 1

    @property
    def held(self) -> int:
        """Bytes of the cache."""
        return cache_bytes(self.cache)

    def select(self, index: Tensor) -> Prefix:
        """The prompts at `index` (repeats allowed); gradients flow back to the selected ones."""
        prompts = [self.prompts[i] for i in index.tolist()]
        return Prefix(
            select_cache(self.cache, index), self.mask[index], self.last[index], prompts, self.shared
        )


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids [N, P], mask [N, P] bool), padded with 0 on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], dtype=torch.long, device=device)
    keep = torch.tensor(
        [[False] * (width - len(r)) + [True] * len(r) for r in rows], dtype=torch.bool, device=device
    )
    return ids.reshape(len(rows), width), keep.reshape(len(rows), width)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids [B, T], lengths [B]), padded with 0 on the right, T at least 1."""
    width = max(1, *map(len, rows)) if rows else 1
    ids = torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    return ids.reshape(len(rows), width), torch.tensor([len(r) for r in rows], device=device)


ARGUMENTS = ("attention_mask", "position_ids", "logits_to_keep")
MIN_SAVED = 128  # tokens of padding that cost about as much as the fixed work of one more pass on a CPU


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


def select_cache(cache: Cache | None, index: Tensor) -> Cache | None:
    """A new cache with the rows at `index` (repeats allowed); gradients flow back to the old one."""
    return None if cache is None else _map_cache(cache, lambda x: x[index])


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of the tensors in a cache."""
    layers = [] if cache is None else cache.layers
    kept = [
        y
        for layer in layers
        for x in vars(layer).values()
        for y in (x.values() if isinstance(x, dict) else [x])
    ]
    return sum(x.nbytes for x in kept if isinstance(x, Tensor))


def _map_cache(cache: Cache, change: Any, own: bool = False) -> Cache:
    """A copy of a cache with each of its tensors changed; own: the cache itself, so that one layer is held twice."""
    out = cache if own else copy.copy(cache)
    if not own:
        out.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in out.layers:
        for name, value in vars(layer).items():
            if (
                isinstance(value, Tensor) and value.dim() > 1
            ):  # a one-dimensional tensor is a setting, not a state
                setattr(layer, name, change(value))
            elif isinstance(value, dict):  # convolutional and recurrent states
                setattr(layer, name, {k: change(x) if isinstance(x, Tensor) else x for k, x in value.items()})
    return out


class Passes:
    """The forward passes of one model (also one that peft has wrapped).

    What goes through at once is up to the caller, who asks `blocks`, `groups` and `fit`; the methods below cut nothing.
    """

    def __init__(self, model: Any, sharing: Sharing, memory: Memory | None = None):
        self.model, self.sharing, self.memory = model, sharing, memory or Memory()

    # How much goes at once

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
        for group in length_groups(lengths):
            while len(group) > 0:
                each = self.scored_bytes(prefix.longest, int(lengths[group[0]]) + 1)
                size = len(group) if torch.is_grad_enabled() else self.fit(each, prefix.held)
                yield group[:size]
                group = group[size:]

    # What goes

    def encode(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """N prompts (token lists of at least one token), cached in one left-padded pass."""
        heads = [list(p[:-1]) for p in prompts]
        last = torch.tensor([p[-1] for p in prompts], device=self.model.device)
        ids, mask = pad_left(heads, self.model.device)
        if not self._shares([len(p) for p in prompts]) or self._in_vain():
            return Prefix(None, mask, last, prompts, shared=False)
        if ids.shape[1] == 0:
            return Prefix(None, mask, last, prompts)
        cache = self._new_cache()
        self._cached(ids, mask, cache, keep=1)
        return Prefix(cache, mask, last, prompts)

    def extend(self, prefix: Prefix, index: Tensor, texts: Sequence[Sequence[int]]) -> Prefix:
        """B prompts, each prompt index[b] of `prefix` followed by the tokens texts[b]. Only texts[b] pass through the
        model."""
        old = prefix.select(index)
        prompts = [[*p, *text] for p, text in zip(old.prompts, texts, strict=True)]
        heads = [[p[-1], *text][:-1] for p, text in zip(old.prompts, texts, strict=True)]
        last = torch.tensor([p[-1] for p in prompts], device=self.model.device)
        if not any(heads):
            return Prefix(old.cache, old.mask, last, prompts, old.shared)
        ids, lengths = pad_right(heads, self.model.device)
        own = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        mask = torch.cat([old.mask, own], dim=1)
        cache = old.cache if old.cache is not None else self._new_cache() if old.shared else None
        shared = old.shared and self.sharing.spans and self._shares([len(p) for p in prompts])
        if not shared or self._recurrent:  # padding on the right would enter the recurrent states
            return Prefix(None, _left_aligned(mask, mask), last, prompts, shared=False)
        assert cache is not None
        self._cached(ids, torch.cat([old.mask, torch.ones_like(own)], dim=1), cache, keep=1)
        # Relative distances must not count padding between tokens: move padding to the left.
        return Prefix(
            _map_cache(cache, lambda x: _left_aligned(x, mask)), _left_aligned(mask, mask), last, prompts
        )

    def state_logits(self, prefix: Prefix, index: Tensor, tokens: Tensor) -> Tensor:
        """Logits of every state of B completions: [B, T+1, V], differentiable.

        index [B]: the number of each completion's prompt. tokens [B, T] is padded on the right; this padding needs no
        mask, because later tokens do not change the logits of earlier states.
        """
        return self.states(prefix, index, tokens)[0]

    def states(self, prefix: Prefix, index: Tensor, tokens: Tensor) -> tuple[Tensor, Cache | None]:
        """`state_logits`, and the cache over prompt and completion (None if prompts are not shared)."""
        lengths = [len(prefix.prompts[i]) + tokens.shape[1] for i in index.tolist()]
        with self._recomputing() as recomputes:
            if recomputes or not (prefix.shared and self.sharing.spans and self._shares(lengths)):
                return self._whole_states(prefix, index, tokens), None
        ids = torch.cat([prefix.last[index, None], tokens], dim=1)
        past = prefix.mask[index]
        cache = select_cache(prefix.cache, index) or self._new_cache()
        mask = torch.cat([past, past.new_ones(ids.shape)], dim=1)
        return self._cached(ids, mask, cache), cache

    def packs(self, longest: int) -> bool:
        """May texts of at most `longest` tokens be scored by `branch_logits`?"""
        return self.sharing.packed and (self.sharing.window is None or longest <= self.sharing.window)

    def branch_logits(self, ids: Tensor, positions: Tensor, allowed: Tensor, cache: Cache) -> Tensor:
        """Logits [b, Q, V] of branches side by side after a cache. ids, positions [b, Q]. allowed [b, Q, keys] bool:
        the keys that each token sees."""
        dtype = self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
        return self._call(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: cache},
        )

    def write(self, prefix: Prefix, index: Tensor) -> Writer:
        """A `Writer` of texts that start as the prompts at `index`. Use it without gradient."""
        return Writer(self, prefix, index)

    def whole(self, texts: Sequence[Sequence[int]], first: Sequence[int], count: int) -> Tensor:
        """Logits [B, count, V] after the tokens first[b] .. first[b] + count - 1 of whole texts, without a cache.

        If a text is shorter, its logits beyond its end have no meaning.
        """
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        for rows in self._sides([len(text) for text in texts]):
            width = max(max(len(texts[b]) for b in rows), max(first[b] for b in rows) + count)
            # Any token may pad a causal model on the right; the last token of the text is in the vocabulary.
            ids = torch.tensor(
                [[*texts[b], *[texts[b][-1]] * (width - len(texts[b]))] for b in rows],
                device=self.model.device,
            )
            start = min(first[b] for b in rows)
            logits = self._call(input_ids=ids, use_cache=False, **self._keep(width - start))[
                :, start - width :
            ]
            for b, row in zip(rows, logits, strict=True):
                out[b] = row[first[b] - start :][:count]
        return torch.stack(out)

    def log_probs(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[B, L-1] log p of each token of whole texts except the first, given the tokens before it; nats,
        differentiable.

        L: length of the longest text. Entries beyond the end of a text have no meaning.
        """
        ids, lengths = pad_right(texts, self.model.device)
        logits = self.whole(texts, [0] * len(texts), max(1, int(lengths.max()) - 1))
        return gather_log_probs(logits[:, : ids.shape[1] - 1], ids[:, 1:])

    def last_log_probs(self, text: Sequence[int], count: int) -> Tensor:
        """[count] log p of the last tokens of a whole text (not its first), given those before them; nats."""
        count = min(count, len(text) - 1)
        if count == 0:
            return torch.zeros(0, device=self.model.device)
        logits = self.whole([text], [len(text) - 1 - count], count)
        return gather_log_probs(logits, torch.tensor([list(text[-count:])], device=logits.device))[0]

    @property
    def hidden_size(self) -> int:
        """The size H of the last hidden state."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Yields a list that gets the last hidden states [b, Q, H] (the input of the output layer) of every pass in the
        block, in order."""
        seen: list[Tensor] = []
        layer = self.model.get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def has_absolute_positions(self, prompt: Sequence[int]) -> bool:
        """Do the logits change when all positions move by one? With rotary positions they do not."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        positions = torch.arange(len(prompt), device=self.model.device)[None]
        at, moved = (self._call(input_ids=ids, position_ids=positions + k).float() for k in (0, 1))
        return not torch.allclose(at, moved, atol=1e-2 * at.std().item(), rtol=0)

    def _whole_states(self, prefix: Prefix, index: Tensor, tokens: Tensor) -> Tensor:
        prompts = [list(prefix.prompts[i]) for i in index.tolist()]
        texts = [p + z for p, z in zip(prompts, tokens.tolist(), strict=True)]
        return self.whole(texts, [len(p) - 1 for p in prompts], tokens.shape[1] + 1)

    def _in_vain(self) -> bool:
        """Would a cache be useless? Recurrent states are written in place, so gradients cannot flow through them, and
        activation checkpointing keeps no cache."""
        return torch.is_grad_enabled() and (self._recurrent or bool(self._checkpointed()))

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

    @contextmanager
    def _recomputing(self) -> Iterator[bool]:
        """Yields whether activation checkpointing recomputes this pass: then there is no cache, and layers must be in
        training mode."""
        layers = self._checkpointed() if torch.is_grad_enabled() else []
        before = [m.training for m in layers]
        for m in layers:
            m.training = True
        try:
            yield bool(layers)
        finally:
            for m, mode in zip(layers, before, strict=True):
                m.training = mode

    def _checkpointed(self) -> list[Any]:
        return [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) is True]

    # Calls of the model

    @cached_property
    def _accepts(self) -> frozenset[str]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        named = frozenset(inspect.signature(base.forward).parameters)
        # A wrapper without named arguments passes all of them on.
        return named if "input_ids" in named else frozenset(ARGUMENTS)

    @property
    def _cache_name(self) -> str:
        return versions.cache_argument(self._accepts)

    def _new_cache(self) -> Cache:
        """The model's own kind of cache, except that sliding windows keep all keys: a key that is outside the window of
        one completion may be inside that of another. The mask applies the window."""
        cache = DynamicCache(config=self.model.config)
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                cache.layers[i] = DynamicLayer()
        return cache

    @cached_property
    def _recurrent(self) -> bool:
        layers = self._new_cache().layers
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)

    def _cached(self, ids: Tensor, mask: Tensor, cache: Cache, keep: int | None = None) -> Tensor:
        """Logits [B, Q, V] of ids [B, Q] (or only of the last `keep`); ids are added to the cache. mask [B, keys]
        includes ids."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        asked = {"attention_mask": mask.long(), "position_ids": positions}
        return self._call(
            input_ids=ids,
            use_cache=True,
            **{self._cache_name: cache},
            **{k: x for k, x in asked.items() if k in self._accepts},
            **self._keep(keep),
        )

    def _keep(self, count: int | None) -> dict[str, int]:
        """The argument for only the last `count` logits, if the model has it."""
        return {} if count is None or "logits_to_keep" not in self._accepts else {"logits_to_keep": count}

    def _call(self, **arguments: Any) -> Tensor:
        return self.model(**arguments).logits


class Writer:
    """n texts that grow token by token. `logits`: after the current texts. `append`: continue any of the texts."""

    def __init__(self, passes: Passes, prefix: Prefix, index: Tensor):
        self.passes = passes
        start = prefix.select(index)
        self._ids, self._mask = start.last, start.mask
        self._shared = start.shared and passes.sharing.steps
        self._cache = (start.cache or passes._new_cache()) if self._shared else None  # its own
        self._texts = [] if self._shared else [list(p) for p in start.prompts]

    def logits(self) -> Tensor:
        """[n, V] logits of the next token. Call it once after each `append`."""
        if self._cache is None:
            return self.passes.whole(self._texts, [len(text) - 1 for text in self._texts], 1)[:, 0]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._ids), 1)], dim=1)
        return self.passes._cached(self._ids[:, None], self._mask, self._cache)[:, -1]

    def append(self, parents: Tensor, ids: Tensor) -> None:
        """Replace the texts by the texts `parents` [m], each followed by a token of ids [m]."""
        if self._cache is None:
            pairs = zip(parents.tolist(), ids.tolist(), strict=True)
            self._texts = [[*self._texts[i], token] for i, token in pairs]
            return
        if not torch.equal(parents, torch.arange(len(self._mask), device=parents.device)):
            self._cache = _map_cache(self._cache, lambda x: x[parents], own=True)
            self._mask = self._mask[parents]
        self._ids = ids


def _left_aligned(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, W] or [B, .., W, D] with the columns where mask [B, W] is False moved to the left."""
    order = mask.int().argsort(dim=1, stable=True)
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(-2, order.view(len(order), *[1] * (x.dim() - 3), -1, 1).expand_as(x))


def log_norms(logits: Tensor) -> Tensor:
    """[.., S] float32 logsumexp of logits [.., S, V], without a copy of them all."""
    rows = logits.flatten(0, -2) if logits.is_contiguous() else logits
    size = at_once(logits.device, rows.shape[1:].numel())
    return torch.cat([part.float().logsumexp(-1) for part in rows.split(size)]).view(logits.shape[:-1])


def gather_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[..., token] in float32 without keeping the whole log-softmax: [..., T]."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1).float() - log_norms(logits)
