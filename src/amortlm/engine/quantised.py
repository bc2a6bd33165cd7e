"""Models whose matrices bitsandbytes keeps in 4 bits, as a frozen p for LoRA (QLoRA, Dettmers et al. 2023).

p is the quantised model itself, not the one that it was made of: its log-probabilities are computed from the packed
weights, in sampling, scoring and training alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from amortlm.errors import ConfigError

BLOCK = 64  # weights with a scale of their own
# What decides the numbers of a quantised model; the rest says how they are stored.
SETTINGS = (
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "llm_int8_skip_modules",
)


def is_quantised(model: nn.Module) -> bool:
    """Are weights packed? Their type may be a floating-point one (`bnb_4bit_quant_storage`), of bits."""
    return any(_is_packed(p) for p in model.parameters())


def settings(model: Any) -> dict[str, Any] | None:
    """How the weights of a model were quantised, as JSON, for `config`; None if they were not, by bitsandbytes in 4
    bits."""
    found = _config(model)
    return None if found is None else {name: found.to_dict()[name] for name in SETTINGS}


def config(saved: Mapping[str, Any]) -> BitsAndBytesConfig:
    """The `quantization_config` of `settings`. Raises ConfigError."""
    try:
        if set(saved) != set(SETTINGS) or saved["bnb_4bit_quant_type"] not in ("nf4", "fp4"):
            raise ValueError(f"not {', '.join(SETTINGS)}")
        return BitsAndBytesConfig(load_in_4bit=True, **saved)
    except (ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f"quantization cannot be {str(dict(saved))[:80]}: {e}") from e


def prepare(model: Any, name: str) -> None:
    """Make a model that transformers has loaded fit for exact passes and for gradients. Raises ConfigError for one that
    cannot be."""
    if getattr(model, "is_loaded_in_8bit", False):
        raise ConfigError(
            f"{name}: in 8 bits, what is rounded in a text depends on the other texts of a batch: give "
            "BitsAndBytesConfig(load_in_4bit=True)"
        )
    if any(_is_packed(m.weight) for m in (model.get_output_embeddings(), model.get_input_embeddings())):
        raise ConfigError(
            f"{name}: embeddings and output head must not be quantised: leave llm_int8_skip_modules out, or name the "
            "head in it ('lm_head')"
        )
    for module in model.modules():
        if not _is_packed(getattr(module, "weight", None)):
            continue
        # On a CPU with AVX512-BF16, the first pass without gradient would pack the weights anew, in place, for a kernel
        # that computes in bfloat16 and has no gradient.
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None:  # else the first pass does it
            module.bias.data = module.bias.data.to(module.compute_dtype)


def precision(model: Any) -> torch.dtype:
    """The coarsest type in which a model computes: that of its packed layers may be another than its own."""
    found = _config(model)
    kinds = [model.dtype] if found is None else [model.dtype, found.bnb_4bit_compute_dtype]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def states(model: nn.Module) -> list[Any]:
    """The scales of packed weights, which belong to modules, beside the parameters."""
    return [m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None]


def numbers(model: Any) -> int:
    """How many weights a model has; a packed tensor has more than elements."""
    packed = {id(m.weight): m.quant_state.shape.numel() for m in model.modules() if hasattr(m, "quant_state")}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def packed_bytes(model: Any) -> int:
    """Bytes of the weights of a model that is not quantised, if it is in NF4: of its matrices, without embeddings and
    head, a half for each number and four for each `BLOCK`."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    packed = {
        id(m.weight): m.weight.numel()
        for m in model.modules()
        if type(m).__name__ in ("Linear", "Conv1D") and all(m is not end for end in ends)
    }
    whole = sum(p.nbytes for p in model.parameters() if id(p) not in packed)
    return whole + sum((n + 1) // 2 + 4 * -(-n // BLOCK) for n in packed.values())


def _config(model: Any) -> Any:
    found = getattr(model.config, "quantization_config", None)
    return found if getattr(found, "load_in_4bit", False) else None


def _is_packed(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and (
        not weight.is_floating_point() or hasattr(weight, "quant_state")
    )
