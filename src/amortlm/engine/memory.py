"""What a pass without gradient holds, in bytes, and so how many texts go at once.

One setting, `memory_mb`, for p and the policies made of it. Sizes are read off a model's config: they are what its
layers hold in the large, not to the byte. A pass with gradients is not cut: what it keeps for the way back is as large
as the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CPU_MB = 256
GPU_SHARE = 8  # by default a pass may take an eighth of a GPU's memory
EAGER = 12  # bytes of a pair of tokens in each head: scores, softmax and a copy
MASK = 8  # bytes of a pair of tokens: the mask as truth values and as numbers


@dataclass
class Memory:
    """The setting: MiB that a pass without gradient may hold at once."""

    mb: float = CPU_MB


def default_mb(device: torch.device) -> float:
    """The setting where none is given, in MiB."""
    if device.type != "cuda":
        return CPU_MB
    return torch.cuda.get_device_properties(device).total_memory / GPU_SHARE / 2**20


@dataclass(frozen=True)
class Sizes:
    """Bytes that a model's passes hold.

    logit        a number of the logits; vocabulary: how many there are of a state
    activations  of a token, in the layer that is at work
    cache        keys and values of a token in all layers, and the copies that the layer at work makes of its own
    pair         of a token and one that it may attend to
    """

    logit: int
    vocabulary: int
    activations: int
    cache: int
    pair: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        config, size = model.config.get_text_config(decoder=True), model.dtype.itemsize
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        heads = _setting(config, 1, "num_attention_heads")
        width = _setting(config, -(-hidden // heads), "head_dim")
        kept = _setting(config, heads, "num_key_value_heads")
        inner = _setting(config, 4 * hidden, "intermediate_size", "ffn_dim", "n_inner", "d_ff")
        layers = _setting(config, 1, "num_hidden_layers")
        repeated = 2 * heads * width if kept < heads else 0
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return cls(
            logit=size,
            vocabulary=vocabulary,
            activations=size * (8 * hidden + 5 * inner + 2 * heads * width),
            cache=size * (2 * (layers + 1) * kept * width + repeated),
            pair=MASK + (EAGER * heads if eager else 0),
        )

    def text(self, tokens: int, past: int = 0, logits: int | None = None, extra: int = 0) -> int:
        """Bytes of a text that goes on from a cache over `past` tokens by `tokens`.

        logits: how many of its tokens have logits (None: all), with `extra` bytes beside each number of them.
        """
        layer = tokens * self.activations + tokens * (past + tokens) * self.pair
        head = (tokens if logits is None else logits) * self.vocabulary * (self.logit + extra)
        return (past + tokens) * self.cache + max(layer, head)


def _setting(config: Any, otherwise: int, *names: str) -> int:
    """A number in a config, the largest if it differs between layers."""
    for name in names:
        if found := [x for x in _values(config, name) if isinstance(x, int) and x > 0]:
            return max(found)
    return otherwise


def _values(config: Any, name: str) -> list[Any]:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers: it varies by layer
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return list(value) if isinstance(value, list | tuple) else [value]
