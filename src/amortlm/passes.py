"""Forward passes of a causal LM in which a prompt is encoded once for all its completions.

A prompt of P tokens is split: its first P-1 tokens fill a key/value cache (one row per prompt), its last
token starts every completion. So one pass over `[last, z_1 .. z_T]` gives the logits of all T+1 states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Prefix:
    """N encoded prompts: cache over the first P-1 tokens (None when P = 1), left-padded.

    mask [N, P-1] bool, last [N] long: the last token of each prompt, prompts: the token lists.
    """

    cache: DynamicCache | None
    mask: Tensor
    last: Tensor
    prompts: Sequence[Sequence[int]]


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


def select_cache(cache: DynamicCache | None, index: Tensor) -> DynamicCache | None:
    """A new cache with the rows at `index` (repeats allowed); gradients flow back to the old one."""
    if cache is None:
        return None
    out = DynamicCache()
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        out.update(layer.keys[index], layer.values[index], i)
    return out


def encode_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Fill the cache for N prompts (token lists of at least one token) in one left-padded pass."""
    heads = [list(p[:-1]) for p in prompts]
    last = torch.tensor([p[-1] for p in prompts], device=model.device)
    ids, mask = pad_left(heads, model.device)
    if ids.shape[1] == 0:
        return Prefix(None, mask, last, prompts)
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=_positions(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(out.past_key_values, mask, last, prompts)


def extend(model: PreTrainedModel, prefix: Prefix, index: Tensor, texts: Sequence[Sequence[int]]) -> Prefix:
    """B prompts: prompt index[b] of `prefix` and then the tokens texts[b] (at least one), which alone are passed."""
    old = index.tolist()
    written = [[int(prefix.last[i]), *text] for i, text in zip(old, texts, strict=True)]
    ids, own = pad_left([w[:-1] for w in written], model.device)
    mask = torch.cat([prefix.mask[index], own], dim=1)
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=_positions(mask)[:, -ids.shape[1] :],
        past_key_values=select_cache(prefix.cache, index),
        use_cache=True,
        logits_to_keep=1,
    )
    last = torch.tensor([w[-1] for w in written], device=model.device)
    prompts = [[*prefix.prompts[i], *text] for i, text in zip(old, texts, strict=True)]
    return Prefix(out.past_key_values, mask, last, prompts)


def state_logits(
    model: PreTrainedModel, prefix: Prefix, index: Tensor, tokens: Tensor, keep_cache: bool = False
) -> tuple[Tensor, DynamicCache | None]:
    """Logits of every state of B completions: [B, T+1, V], and the cache over prompt and completion.

    index [B] names each completion's prompt; tokens [B, T] is right-padded (what follows the end of a
    completion cannot influence what comes before it, so no mask is needed there).
    """
    ids = torch.cat([prefix.last[index, None], tokens], dim=1)
    if _drops_cache(model):
        return _state_logits_without_cache(model, prefix, index, ids), None
    past = prefix.mask[index]
    out = model(
        input_ids=ids,
        attention_mask=torch.cat([past, past.new_ones(ids.shape)], dim=1).long(),
        position_ids=past.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
        past_key_values=select_cache(prefix.cache, index),
        use_cache=keep_cache,
    )
    return out.logits, out.past_key_values if keep_cache else None


def _drops_cache(model: PreTrainedModel) -> bool:
    """Activation checkpointing in train mode returns no cache, so prompts cannot be shared."""
    return bool(getattr(model, "is_activation_checkpointing", False)) and model.training


def _state_logits_without_cache(model: PreTrainedModel, prefix: Prefix, index: Tensor, ids: Tensor) -> Tensor:
    heads, mask = pad_left([list(prefix.prompts[i][:-1]) for i in index.tolist()], ids.device)
    mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
    out = model(
        input_ids=torch.cat([heads, ids], dim=1),
        attention_mask=mask.long(),
        position_ids=_positions(mask),
        use_cache=False,
        logits_to_keep=ids.shape[1],
    )
    return out.logits


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def gather_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[..., token] in float32 without keeping the whole log-softmax: [..., T]."""
    picked = logits.gather(-1, tokens[..., None]).squeeze(-1).float()
    return picked - logits.float().logsumexp(-1)
