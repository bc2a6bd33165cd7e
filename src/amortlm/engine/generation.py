"""`generate` of transformers on a support: its decoders with q."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from amortlm.engine.passes import Passes
from amortlm.engine.prefix import pad_left
from amortlm.support.law import SupportLaw


@dataclass(frozen=True)
class Generated:
    """completions: token lists with their stop symbols, grouped by prompt. token_passes: see `Decoded`."""

    completions: list[list[int]]
    token_passes: int


def generate(
    passes: Passes,
    law: SupportLaw,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    merge_stops: bool,
) -> Generated:
    """The completions of prompts by `generate`. merge_stops: the first stop symbol gets the probability of all, as
    searches need it."""
    config = copy.deepcopy(config)
    config.max_new_tokens = law.max_tokens + 1
    config.eos_token_id, config.pad_token_id = list(law.stop_ids), law.stop_ids[0]
    ids, mask = pad_left(prompts, passes.model.device)
    processor = SupportProcessor(law, ids.shape[1], merge_stops)
    with _own_defaults(passes.model) as model:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([processor]),
        )
    completions = [_until_stop(z, law.stop_ids) for z in out[:, ids.shape[1] :].tolist()]
    return Generated(completions, processor.token_passes)


class SupportProcessor(LogitsProcessor):
    """Makes `generate` decode from q on its support. token_passes counts the tokens that pass through the model."""

    def __init__(self, law: SupportLaw, prompt_width: int, merge_stops: bool):
        self.law, self.prompt_width, self.merge_stops = law, prompt_width, merge_stops
        self.token_passes = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.token_passes += len(scores)
        tokens = input_ids[:, self.prompt_width :]
        t = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        step = self.law.step(scores, t, self.law.nodes(tokens)[:, -1])
        if self.merge_stops:
            return step.merged(self.law.stop_ids)
        # Sampling uses only ratios: relative to the likeliest token, no temperature overflows.
        return step.log_q - step.log_q.amax(-1, keepdim=True)


@contextmanager
def _own_defaults(model: Any) -> Iterator[Any]:
    """The model without the generation config of its checkpoint, which `generate` would otherwise use."""
    if hasattr(model, "peft_config"):
        model = model.get_base_model()
    saved, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = saved


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first stop symbol, which is included (`generate` pads after it)."""
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens) - 1)
    return tokens[: end + 1]
