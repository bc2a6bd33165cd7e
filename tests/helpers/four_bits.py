"""Models in 4 bits, and the memory that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BitsAndBytesConfig

from amortlm import LanguageModel
from amortlm.engine import quantised


def packing(**settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


def load(folder: str | Path, **settings: Any) -> LanguageModel:
    return LanguageModel.from_pretrained(folder, quantization_config=packing(**settings))


def storages(*models: Any) -> dict[int, int]:
    """The memory of models and of the scales of their packed weights: address -> bytes."""
    tensors: list[Tensor] = [p.detach() for model in models for p in model.parameters()]
    for state in (state for model in models for state in quantised.states(model)):
        tensors += [x.absmax for x in (state, state.state2) if x is not None]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
