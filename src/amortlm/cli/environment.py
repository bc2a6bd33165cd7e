"""What a computation runs on: versions, device, threads, dtype."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from amortlm.language_model import LanguageModel

LIBRARIES = (
    *(
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
    ),
    *("numpy", "gguf", "trl", "genlm-control"),
)


def environment(lm: LanguageModel) -> dict[str, Any]:
    """versions (of what is installed), and device, dtype and number of threads of a model."""
    versions = {"amortlm": version("amortlm"), "python": platform.python_version()}
    versions |= {name: found for name in LIBRARIES if (found := _version(name))}
    device = lm.model.device
    return {
        "versions": versions,
        "device": f"{device} ({torch.cuda.get_device_name(device)})"
        if device.type == "cuda"
        else str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
