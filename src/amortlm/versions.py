"""Differences between the supported versions of transformers; a comment says when each function can be removed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from functools import partial
from typing import Any

import transformers
from tqdm.auto import tqdm

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])


# Needed until transformers >= 5.24, and as long as models with remote code are written for older versions.
def cache_argument(accepted: Collection[str]) -> str:
    """The name of the cache argument of a model. accepted: the arguments that it names; empty if it passes on all."""
    newest = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"
    return next((name for name in ("cache", "cache_params", "past_key_values") if name in accepted), newest)


# Needed until transformers >= 5.23.
def checkpoint_activations(model: Any, settings: dict[str, Any]) -> None:
    """Call `model.activation_checkpointing_enable` (before transformers 5.23: `gradient_checkpointing_enable`)."""
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    changed = {
        f"{name}_kwargs" if key.endswith("_checkpointing_kwargs") else key: x for key, x in settings.items()
    }
    getattr(model, f"{name}_enable")(**changed)


# Needed until transformers >= 5.23: the functions below then become an import and two calls in text/codec.py.
def control_tokens(tokenizer: Any, template: str) -> Collection[str]:
    """The tokens that structure a chat: special tokens, and tokens that the chat template writes."""
    if hasattr(tokenizer, "_get_control_tokens"):
        return tuple(tokenizer._get_control_tokens(template))
    added = tokenizer.added_tokens_decoder.values()
    return [t.content for t in added if t.special or (t.content.strip() and t.content in template)]


def mark_control_token(token: str, pattern: re.Pattern[str]) -> str:
    """The token with a mark, so that it is read as text: see `reading_marked`."""
    if TRANSFORMERS < (5, 23):
        return token
    from transformers.utils.chat_template_utils import mark_control_tokens

    return str(mark_control_tokens(token, pattern))


def reading_marked() -> dict[str, bool]:
    """Tokenizer settings with which marked tokens are read as text. Raises NotImplementedError for versions without
    them."""
    if TRANSFORMERS < (5, 23):
        raise NotImplementedError(
            f"transformers {transformers.__version__} reads it as a control token; versions from 5.23 do not"
        )
    return {"sanitize_control_tokens": True}


# Until transformers >= 5.23, which else would keep GGUF weights packed.
def dequantise() -> dict[str, Any]:
    """Settings of `from_pretrained` by which the weights of a GGUF file become plain tensors."""
    _quiet_in_a_pipe()
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


# As long as transformers draws the progress of dequantising in a pipe, too.
def _quiet_in_a_pipe() -> None:
    with contextlib.suppress(ImportError):
        from transformers import modeling_gguf_pytorch_utils as reader

        vars(reader)["tqdm"] = partial(tqdm, disable=None)


# As long as transformers takes a model that it has dequantised for a quantised one, which it does not train or save.
def unmark_quantised(model: Any) -> None:
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
