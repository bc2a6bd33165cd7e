"""The law of supports inside vLLM: a logits processor that draws the next token of each request itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from amortlm_vllm.law import Law, as_logits, draw

FOLDER = "AMORTLM_VLLM_SUPPORTS"  # environment variable: where the server keeps the tables of supports
ARGUMENT = "amortlm"  # in SamplingParams.extra_args


@dataclass
class _Text:
    """One request. `written` is vLLM's own list, which grows; `node` is the automaton's after `seen` tokens."""

    support: str
    kept: list[int]
    uniforms: list[float]
    heat: float
    epsilon: float
    written: list[int]
    seen: int = 0
    node: int = 0

    def state(self, law: Law) -> tuple[int, int]:
        """(tokens written, node), from the tokens: an interrupted request begins again with them."""
        if self.written and self.written[-1] < 0:
            raise RuntimeError("vLLM gives tokens that are not known yet: start it without async scheduling")
        count = len(self.kept) + len(self.written)
        if law.step is not None:
            self.node = law.after(self.node, [*self.kept, *self.written][self.seen :])
        self.seen = count
        return count, self.node


@lru_cache(maxsize=64)
def _tables(name: str, device: torch.device) -> tuple[Law, Law]:
    """A support in the memory of the host, where nodes are followed, and of the device, where tokens are drawn."""
    law = Law.from_bytes((Path(os.environ[FOLDER]) / f"{name}.safetensors").read_bytes())
    return law, law.to(device)


class SupportProcessor(LogitsProcessor):
    """Draws the next tokens of the requests that name a support, and leaves the others alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._device, self._texts = device, dict[int, _Text]()  # by their place in the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._texts.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._texts.pop(index, None)
            if own := (params.extra_args or {}).get(ARGUMENT):
                self._texts[index] = _Text(**own, written=written)
        for a, b, direction in batch_update.moved:
            self._move(a, b, swap=direction == MoveDirectionality.SWAP)

    def _move(self, a: int, b: int, swap: bool) -> None:
        first, second = self._texts.pop(a, None), self._texts.pop(b, None)
        if first is not None:
            self._texts[b] = first
        if swap and second is not None:
            self._texts[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        groups: dict[str, list[int]] = {}
        for index, text in self._texts.items():
            groups.setdefault(text.support, []).append(index)
        for support, indices in groups.items():
            here, law = _tables(support, self._device)
            texts = [self._texts[i] for i in indices]
            t, node = zip(*(text.state(here) for text in texts), strict=True)
            numbers = [(x.uniforms[k], x.heat, x.epsilon) for x, k in zip(texts, t, strict=True)]
            rows, t, node = torch.tensor([indices, t, node], device=self._device)
            drawn = draw(law, logits[rows], t, node, *torch.tensor(numbers, device=self._device).unbind(1))
            logits[rows] = as_logits(drawn, law.stop_ids, logits.shape[1])
        return logits
