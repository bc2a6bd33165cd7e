"""What an update of a policy holds, in bytes, without its weights: a model of the same shape on the meta device, which
has no numbers, goes through the passes of an update, and autograd says what it keeps for the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from amortlm.engine.prefix import select_cache


@dataclass(frozen=True)
class Shape:
    """An update: prompts of so many tokens, and for each so many completions (of so many tokens, without the stop)."""

    prompts: int
    prompt_tokens: int
    completions: int
    completion_tokens: int

    @property
    def texts(self) -> tuple[int, int]:
        """(how many, tokens of each) if prompts are not shared."""
        return self.prompts * self.completions, self.prompt_tokens - 1 + self.completion_tokens


@dataclass(frozen=True)
class Footprint:
    """Numbers of weights, and bytes.

    parameters, trained  how many weights p has, and how many q trains
    weights, own         of p, and of q beside them
    kept                 what autograd keeps of the passes, without the logits
    kept_whole           the same where prompts are not shared: one pass over each prompt with each of its completions
    kept_checkpointed    the same with activation checkpointing: the inputs of the layers, and one layer computed again
    logits               of all states of the completions
    block                of the largest part that is gathered at a time if weights are sharded
    """

    parameters: int
    trained: int
    weights: int
    own: int
    kept: int
    kept_whole: int
    kept_checkpointed: int
    logits: int
    block: int

    @classmethod
    def of(cls, model: Any, policy: Any, shape: Shape) -> Footprint:
        """model: p on the meta device; policy: a trainable copy of it. Prompts are taken to be as long as the longest
        and encoded once for their completions, and no two completions to be equal."""
        with torch.device("meta"):
            kept, logits = _shared_passes(policy, shape)
            kept_whole = _whole_pass(policy, shape)
        own = [p for p in policy.parameters() if p.requires_grad]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in own),
            weights=_size(model.parameters()),
            own=_size(own),
            kept=kept,
            kept_whole=kept_whole,
            kept_checkpointed=_inputs(model, shape) + kept_whole // len(_layers(model)),
            logits=logits,
            block=max(_size(part.parameters()) for part in _blocks(model)),
        )


def _whole_pass(model: Any, shape: Shape) -> int:
    """Bytes kept of a pass over whole texts."""
    texts, width = shape.texts
    with _Kept(model) as kept:
        kept.seeing(width, width)
        ids = torch.zeros(texts, width, dtype=torch.long)
        cache = DynamicCache(config=model.config)  # without one, transformers would look at numbers
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=shape.completion_tokens)
    return kept.bytes()


def _shared_passes(model: Any, shape: Shape) -> tuple[int, int]:
    """(bytes kept, bytes of the logits) of the two passes of an update, as `Policy.evaluate` makes them."""
    n, k, t = shape.prompts, shape.completions, shape.completion_tokens
    width = shape.prompt_tokens - 1  # the last token of a prompt begins the other pass
    cache = DynamicCache(config=model.config)
    index = torch.arange(n).repeat_interleave(k, output_size=n * k)
    with _Kept(model) as kept:
        if width:
            kept.seeing(width, width)
            ids = torch.zeros(n, width, dtype=torch.long)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        kept.seeing(t, width + t)
        place = torch.arange(width, width + t).expand(n * k, -1)
        ids = torch.zeros(n * k, t, dtype=torch.long)  # after the longest completion, the stop is sure
        logits = model(
            input_ids=ids,
            past_key_values=select_cache(cache, index) if width else cache,
            position_ids=place,
            use_cache=True,
        ).logits
    return kept.bytes(), logits.nbytes


class _Kept:
    """Counts the tensors that autograd keeps, each storage once, without the weights.

    The meta device has no fused attention, and keeps the weights of all pairs of tokens instead; they are left out.
    """

    def __init__(self, model: Any):
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._found: dict[int, torch.UntypedStorage] = {}
        self._pairs: tuple[int, int] | None = None
        self._fused = getattr(model.config, "_attn_implementation", None) != "eager"

    def seeing(self, tokens: int, keys: int) -> None:
        """So many tokens attend to so many."""
        self._pairs = (tokens, keys) if self._fused else None

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._own and not (x.dim() == 4 and x.shape[2:] == self._pairs):
            self._found[storage._cdata] = storage  # held, so that no other gets its number
        return x

    def __enter__(self) -> _Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _inputs(model: Any, shape: Shape) -> int:
    """Bytes of what enters the layers."""
    texts, width = shape.texts
    hidden = model.get_input_embeddings().weight.shape[1]
    return len(_layers(model)) * texts * width * hidden * int(model.dtype.itemsize)


def _layers(model: Any) -> list[Any]:
    """The modules of the longest list."""
    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _blocks(model: Any) -> list[Any]:
    """The parts that are gathered one after the other: the layers, the embeddings and the head."""
    return [*_layers(model), model.get_input_embeddings(), model.get_output_embeddings()]


def _size(parameters: Any) -> int:
    return sum(p.nbytes for p in parameters)
