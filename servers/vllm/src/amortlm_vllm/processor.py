"""The law of supports inside vLLM: a logits processor that draws the next token of each request itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
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
        """(tokens written, node), from the tokens themselves: they are what an interrupted request begins again with."""
        count = len(self.kept) + len(self.written)
        new = (self.kept + self.written)[self.seen :] if self.seen <= count else self.kept + self.written
        if self.seen > count:
            self.node = 0
        if any(token < 0 for token in new):
            raise RuntimeError("vLLM gives tokens that are not known yet: start it without async scheduling")
        self.seen, self.node = count, law.after(self.node, new)
        return count, self.node


class SupportProcessor(LogitsProcessor):
    """Draws the next tokens of the requests that name a support, and leaves the others alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._device, self._texts = device, dict[int, _Text]()
        self._laws: dict[str, Law] = {}

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
            law, rows = self._law(support), torch.tensor(indices, device=self._device)
            texts = [self._texts[i] for i in indices]
            t, node = zip(*(text.state(law) for text in texts), strict=True)
            numbers = [(x.uniforms[k], x.heat, x.epsilon) for x, k in zip(texts, t, strict=True)]
            u, heat, epsilon = torch.tensor(numbers, device=self._device).unbind(1)
            places = torch.tensor([t, node], device=self._device).unbind(0)
            drawn = draw(law, logits[rows], *places, u, heat, epsilon)
            logits[rows] = as_logits(drawn, law.stop_ids, logits.shape[1]).to(logits.dtype)
        return logits

    def _law(self, name: str) -> Law:
        if name not in self._laws:
            path = Path(os.environ[FOLDER]) / f"{name}.safetensors"
            self._laws[name] = Law.from_bytes(path.read_bytes()).to(self._device)
        return self._laws[name]
