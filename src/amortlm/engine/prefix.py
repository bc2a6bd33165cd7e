"""Encoded prompts: their caches, chosen and cut row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


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


def select_cache(cache: Cache | None, index: Tensor) -> Cache | None:
    """A new cache with the rows at `index` (repeats allowed); gradients flow back to the old one."""
    return None if cache is None else map_cache(cache, lambda x: x[index])


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


def map_cache(cache: Cache, change: Any, own: bool = False) -> Cache:
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


def left_aligned(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, W] or [B, .., W, D] with the columns where mask [B, W] is False moved to the left."""
    order = mask.int().argsort(dim=1, stable=True)
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(-2, order.view(len(order), *[1] * (x.dim() - 3), -1, 1).expand_as(x))
