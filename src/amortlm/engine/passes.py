"""Forward passes of a causal LM in which a prompt is encoded once for all its completions.

A prompt of P tokens is split: its first P-1 tokens fill a key/value cache (one row per prompt), its last
token starts every completion. So one pass over `[last, z_1 .. z_T]` gives the logits of all T+1 states.

Where a model cannot share a prompt exactly (`Sharing`, found out in `amortlm.engine.exactness`), texts go through
whole, padded on the right, and the model is given nothing but tokens, which is exact for every causal architecture.
"""

from __future__ import annotations

import copy
import inspect
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


@dataclass(frozen=True)
class Sharing:
    """What is exact for a model: the same log-probabilities as whole texts give, one at a time.

    steps    a cached prompt goes on token by token (without gradient)
    spans    a cached prompt goes on by several tokens at once
    packed   several continuations stand side by side behind it, under a 4-D mask
    window   the longest text, in tokens, for which packed holds: what the narrowest attention layer sees
    longest  the longest text, in tokens, for which steps and spans hold; None: any
    switch   the length in tokens beyond which a text is read by other rotary embeddings (LongRoPE)
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

    cache over the first P-1 tokens, padded on the left (None where P = 1, or where prompts are not shared), mask
    [N, P-1] bool, last [N] long: the last token of each, prompts: the token lists, shared: may the cache be used?
    """

    cache: Cache | None
    mask: Tensor
    last: Tensor
    prompts: Sequence[Sequence[int]]
    shared: bool = True

    def select(self, index: Tensor) -> Prefix:
        """The prompts at `index` (repeats allowed); gradients flow back to these."""
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
MIN_SAVED = 128  # tokens of padding: about what the fixed work of one more pass costs on a CPU


def length_groups(lengths: Tensor) -> list[Tensor]:
    """The rows 0..B-1 in groups of similar length, longest first: passes that waste little on padding.

    One group on a GPU, where a pass more costs more than padding does.
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


def _map_cache(cache: Cache, change: Any) -> Cache:
    """A copy of a cache with each of its tensors changed."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in out.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.dim() > 1:  # one number is a setting, not a state
                setattr(layer, name, change(value))
            elif isinstance(value, dict):  # convolutional and recurrent states
                setattr(layer, name, {k: change(x) if isinstance(x, Tensor) else x for k, x in value.items()})
    return out


class Passes:
    """The forward passes of one model (also one that peft has wrapped)."""

    def __init__(self, model: Any, sharing: Sharing):
        self.model, self.sharing = model, sharing

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
        """B prompts: prompt index[b] of `prefix` and then the tokens texts[b], which alone are passed."""
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
        if not shared or self._recurrent:  # padding on the right would go into the states
            return Prefix(None, _left_aligned(mask, mask), last, prompts, shared=False)
        assert cache is not None
        self._cached(ids, torch.cat([old.mask, torch.ones_like(own)], dim=1), cache, keep=1)
        # What attends by distance wants no holes: padding moves to the left.
        return Prefix(
            _map_cache(cache, lambda x: _left_aligned(x, mask)), _left_aligned(mask, mask), last, prompts
        )

    def state_logits(self, prefix: Prefix, index: Tensor, tokens: Tensor) -> Tensor:
        """Logits of every state of B completions: [B, T+1, V], differentiable.

        index [B] names each completion's prompt; tokens [B, T] is right-padded (what follows the end of a
        completion cannot influence what comes before it, so no mask is needed there).
        """
        return self.states(prefix, index, tokens)[0]

    def states(self, prefix: Prefix, index: Tensor, tokens: Tensor) -> tuple[Tensor, Cache | None]:
        """`state_logits`, and the cache over prompt and completion (None where it is not shared)."""
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
        """Logits [b, Q, V] of branches side by side behind a cache. allowed [b, Q, keys] bool: what each token sees."""
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
        """Texts that start as the prompts at `index` and grow token by token; to be used without gradient."""
        return Writer(self, prefix, index)

    def whole(self, texts: Sequence[Sequence[int]], first: Sequence[int], count: int) -> Tensor:
        """Logits [B, count, V] after the tokens first[b] .. first[b] + count - 1 of whole texts, each by itself.

        Texts may be shorter than that: what lies beyond their end means nothing.
        """
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        for rows in self._sides([len(text) for text in texts]):
            width = max(max(len(texts[b]) for b in rows), max(first[b] for b in rows) + count)
            # Any token may pad on the right of a causal model; its own last one is at least a known one.
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
        """[B, L-1] log p of each token of whole texts but their first, given those before it; nats, differentiable.

        L: the longest. What lies beyond the end of a text means nothing.
        """
        ids, lengths = pad_right(texts, self.model.device)
        logits = self.whole(texts, [0] * len(texts), max(1, int(lengths.max()) - 1))
        return gather_log_probs(logits[:, : ids.shape[1] - 1], ids[:, 1:])

    @property
    def hidden_size(self) -> int:
        """H of the last hidden state."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """The last hidden states [b, Q, H] of every pass within, in order: what enters the output layer."""
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
        """Is a cache of no use? Gradients cannot go back through recurrent states, which are written in place, and
        activation checkpointing keeps none."""
        return torch.is_grad_enabled() and (self._recurrent or bool(self._checkpointed()))

    def _shares(self, lengths: Sequence[int]) -> bool:
        """May texts of these lengths, in tokens, share a cache and a batch?"""
        found = self.sharing
        if not (found.steps or found.spans) or len(self._sides([n - 1 for n in lengths])) > 1:
            return False
        return found.longest is None or max(lengths) <= found.longest

    def _sides(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that may share a pass: on one side of where rotary embeddings switch, which the longest row decides."""
        if self.sharing.switch is None:
            return [list(range(len(lengths)))]
        long = [n > self.sharing.switch for n in lengths]
        parts = [[b for b, x in enumerate(long) if x == side] for side in (False, True)]
        return [rows for rows in parts if rows]

    @contextmanager
    def _recomputing(self) -> Iterator[bool]:
        """Does activation checkpointing recompute this pass? It keeps no cache, and wants layers in training mode."""
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

    # The model

    @cached_property
    def _accepts(self) -> frozenset[str]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        named = frozenset(inspect.signature(base.forward).parameters)
        # A wrapper that names nothing passes on everything.
        return named if "input_ids" in named else frozenset(ARGUMENTS)

    @property
    def _cache_name(self) -> str:
        return versions.cache_argument(self._accepts)

    def _new_cache(self) -> Cache:
        """The cache that the model would make, but its windows keep all keys: what falls out of one for a completion
        may be in it for another, and the mask says so."""
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
        """Logits [B, Q, V] of ids [B, Q] (of the last `keep`), which join the cache. mask [B, keys]: ids included."""
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
        """The argument that asks for the last `count` logits only, of models that know it."""
        return {} if count is None or "logits_to_keep" not in self._accepts else {"logits_to_keep": count}

    def _call(self, **arguments: Any) -> Tensor:
        return self.model(**arguments).logits


class Writer:
    """n texts that grow. `logits` after what is written; `append` goes on from any of the texts."""

    def __init__(self, passes: Passes, prefix: Prefix, index: Tensor):
        self.passes = passes
        start = prefix.select(index)
        self._ids, self._mask = start.last, start.mask
        self._shared = start.shared and passes.sharing.steps
        self._cache = (start.cache or passes._new_cache()) if self._shared else None
        self._texts = [] if self._shared else [list(p) for p in start.prompts]

    def logits(self) -> Tensor:
        """[n, V]; once after each `append`."""
        if self._cache is None:
            return self.passes.whole(self._texts, [len(text) - 1 for text in self._texts], 1)[:, 0]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._ids), 1)], dim=1)
        return self.passes._cached(self._ids[:, None], self._mask, self._cache)[:, -1]

    def append(self, parents: Tensor, ids: Tensor) -> None:
        """The texts are now those of `parents` [m], each with a token of ids [m] behind it."""
        if self._cache is None:
            pairs = zip(parents.tolist(), ids.tolist(), strict=True)
            self._texts = [[*self._texts[i], token] for i, token in pairs]
            return
        if not torch.equal(parents, torch.arange(len(self._mask), device=parents.device)):
            self._cache, self._mask = select_cache(self._cache, parents), self._mask[parents]
        self._ids = ids


def _left_aligned(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, W] or [B, .., W, D], the columns where mask [B, W] is False brought to the left."""
    order = mask.int().argsort(dim=1, stable=True)
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(-2, order.view(len(order), *[1] * (x.dim() - 3), -1, 1).expand_as(x))


def gather_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[..., token] in float32 without keeping the whole log-softmax: [..., T]."""
    picked = logits.gather(-1, tokens[..., None]).squeeze(-1).float()
    return picked - logits.float().logsumexp(-1)
