"""A disk cache of tensors that take long to compute: safetensors files that may be deleted at any time.

The files are in $AMORTLM_CACHE, or in ~/.cache/amortlm. Nothing depends on them: a file that cannot be read is computed
again, and a file that cannot be written is skipped.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors saved under a name; None if there are none, or the file is damaged."""
    try:
        with safetensors.safe_open(_path(name), "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            whole = (f.metadata() or {}).get("checksum") == _checksum(tensors)
    except (OSError, RuntimeError, safetensors.SafetensorError):
        return None
    return tensors if whole else None


def store(name: str, tensors: dict[str, Tensor]) -> None:
    """Save tensors under a name ("folder/key"), which must identify all that they depend on. A reader sees all of them
    or none."""
    try:
        path = _path(name)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(save(tensors, {"checksum": _checksum(tensors)}))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # no room, no rights, no home
        pass


def _path(name: str) -> Path:
    folder = os.environ.get("AMORTLM_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "amortlm") / f"{name}.safetensors"


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)} ".encode())
        found.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
