"""Forward passes of a causal LM in which a prompt is encoded once for all its completions.

A prompt of P tokens is split: its first P-1 tokens fill a key/value cache (one row per prompt), its last token starts
every completion. So one pass over `[last, z_1 .. z_T]` gives the logits of all T+1 states.

If a model cannot share a prompt exactly (`Sharing`, determined in `amortlm.engine.exactness`), whole texts are passed,
padded on the right, with tokens as the only input. This is exact for every causal architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
from amortlm.engine.packs import Packs
from amortlm.engine.prefix import Prefix, left_aligned, map_cache, pad_left, pad_right, select_cache
from amortlm.engine.shards import shards_of
from amortlm.support.log_probs import at_once

_pause: ContextVar[Callable[[], None] | None] = ContextVar("pause", default=None)


@contextmanager
def pausing(action: Callable[[], None] | None) -> Iterator[None]:
    """Calls `action` before every pass that this thread makes in the block, of any model. It may use models itself, or
    raise, to end what the thread does."""
    token = _pause.set(action)
    try:
        yield
    finally:
        _pause.reset(token)


class Passes(Packs):
    """The forward passes of one model (also one that peft has wrapped).

    They cut nothing: what goes at once is up to the caller, who asks `Packs`.
    """

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
            return Prefix(None, left_aligned(mask, mask), last, prompts, shared=False)
        assert cache is not None
        self._cached(ids, torch.cat([old.mask, torch.ones_like(own)], dim=1), cache, keep=1)
        # Relative distances must not count padding between tokens: move padding to the left.
        return Prefix(
            map_cache(cache, lambda x: left_aligned(x, mask)), left_aligned(mask, mask), last, prompts
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
        """Would a cache be useless? Recurrent states are written in place, so gradients cannot flow through them,
        activation checkpointing keeps no cache, and gradients of a sharded model flow through one pass alone."""
        return self._makes_one_pass() or (
            torch.is_grad_enabled() and (self._recurrent or bool(self._checkpointed()))
        )

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

    def static_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits [n, V] after a token ids [n] of each text at positions [n], which is added to a static cache of W
        tokens; mask [n, W] includes it."""
        asked = {"attention_mask": mask, "position_ids": positions[:, None]}
        return self._call(
            input_ids=ids[:, None],
            use_cache=True,
            **{self._cache_name: cache},
            **{k: x for k, x in asked.items() if k in self._accepts},
        )[:, -1]

    def pause(self) -> None:
        """Call the action of `pausing`."""
        if (action := _pause.get()) is not None:
            # What it does has nothing to do with this pass: not its gradients, nor its precision.
            with pausing(None), torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
                action()

    def _call(self, **arguments: Any) -> Tensor:
        self.pause()
        shards = shards_of(self.model)
        return self.model(**arguments).logits if shards is None else shards.logits(self.model, arguments)


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
        n = len(self._mask)
        if len(parents) != n or not torch.equal(parents, torch.arange(n, device=parents.device)):
            self._cache = map_cache(self._cache, lambda x: x[parents], own=True)
            self._mask = self._mask[parents]
        self._ids = ids


def log_norms(logits: Tensor) -> Tensor:
    """[.., S] float32 logsumexp of logits [.., S, V], without a copy of them all."""
    rows = logits.flatten(0, -2) if logits.is_contiguous() else logits
    size = at_once(logits.device, rows.shape[1:].numel())
    return torch.cat([part.float().logsumexp(-1) for part in rows.split(size)]).view(logits.shape[:-1])


def gather_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[..., token] in float32 without keeping the whole log-softmax: [..., T]."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1).float() - log_norms(logits)
