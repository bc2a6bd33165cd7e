"""GGUF files (of llama.cpp): a model, its tokenizer and its chat template in one file. `transformers` reads and
dequantises them; here is what it leaves to do: finding the file, and seeing that nothing in it was passed over."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amortlm.errors import ConfigError, ModelError
from amortlm.text.codec import Codec

SUFFIX = ".gguf"

# Metadata that changes what a model computes, and the names that a config has for it.
COMPUTATION = {
    "attention.sliding_window": ("sliding_window",),
    "attention.scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "rope.scaling.type": ("rope_type",),
    "rope.scaling.factor": ("factor",),
}


def locate(path: str | Path) -> tuple[str, dict[str, str]]:
    """(folder or repository, settings of `from_pretrained`) of a model: those of a file inside it, if it is GGUF.

    Raises ConfigError where there is no such file, or the reader is not installed."""
    folder, file = os.path.split(path)
    if not file.endswith(SUFFIX):
        return str(path), {}
    is_of_hub = folder.count("/") == 1 and not folder.startswith((".", "/"))  # user/name
    if not is_of_hub and not os.path.isfile(path):
        raise ConfigError(
            f"{str(path)!r}: there is no such file; give a {SUFFIX} file, or user/name/file{SUFFIX}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{str(path)!r} is a GGUF file: to read it, pip install 'amortlm[gguf]'")
    return folder or os.curdir, {"gguf_file": file}


def check_complete(file: str | Path, model: Any) -> None:
    """Raises ModelError where a local GGUF file (not one of the hub) holds what did not become part of the model:
    transformers passes over tensors and settings that it does not know (the rotary factors of Llama 3.1, for one)."""
    from gguf import GGUFReader

    if not os.path.isfile(file):
        return
    reader = GGUFReader(file)
    held = sum(math.prod(tensor.shape.tolist()) for tensor in reader.tensors)
    taken = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight.numel()  # written though it is the input's (Bloom, Falcon)
    if held not in (taken, taken + tied):
        known = [t.name for t in reader.tensors if t.name.startswith("rope_f")]
        raise ModelError(
            f"{file}: {held} numbers in its tensors, {taken} in the model that transformers made of it: it does not "
            f"read all of them{f' ({known[0]})' if known else ''}. Use the model's safetensors"
        )
    prefix = f"{reader.fields['general.architecture'].contents()}."
    config = list(_entries(model.config.to_dict()))
    for key, names in COMPUTATION.items():
        field = reader.fields.get(prefix + key)
        if field is None or field.contents() in (0, "none"):
            continue
        stated = field.contents()
        if not any(name in names and _same(value, stated) for name, value in config):
            raise ModelError(
                f"{file}: its {prefix}{key} is {stated}, which transformers does not read: the model would compute "
                "something else. Use the model's safetensors"
            )


def check_spaces(codec: Codec) -> None:
    """Raises ModelError where a continuation does not keep its first space: transformers 5.17 decodes so."""
    text = " a b"
    if codec.decode(codec.encode_continuation(text)) != text:
        raise ModelError(
            f"{codec.name}: the tokenizer that transformers makes of it loses spaces; use transformers 5.18 or newer, "
            "or the model's safetensors"
        )


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of the parts of a config included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield name, value


def _same(value: Any, stated: Any) -> bool:
    """Equal up to the rounding of a 32-bit number."""
    if isinstance(value, (int, float)) and isinstance(stated, (int, float)):
        return math.isclose(value, stated, rel_tol=1e-5)
    return bool(value == stated)
