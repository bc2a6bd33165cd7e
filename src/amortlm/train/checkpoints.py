"""The files that a checkpoint has besides those of `transformers.Trainer`, and tests that it is complete.

checkpoint-N/process-K/       replay buffer, cached rewards and learned log Z of process K; with sharded models its part
                              of the optimizer's state
checkpoint-N/run.json         the identity of its run (`amortlm.train.run`)
checkpoint-N/manifest.json    size and hash of every file, written once all processes have written theirs
checkpoint-N/trainer_state.json    written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from amortlm.engine.shards import local, sharded_as
from amortlm.errors import CheckpointError
from amortlm.files import STATE, follow_umask, is_disk_full, save_tensors

logger = logging.getLogger(__name__)
MANIFEST, OPTIMIZER = "manifest.json", "optimizer.pt"
# Errors of readers for a file that is damaged, of another layout, or contains objects that may not be loaded.
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)
START_OVER = "start over with overwrite_output_dir=True (--overwrite)"


class Store(Protocol):
    """State of a process that is saved in checkpoints: the replay buffer, the reward memory."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def save_state(folder: Path, process: int, stores: Sequence[Store], log_z: Tensor | None) -> None:
    """Write the stores and the learned log Z of one process into a checkpoint folder."""
    own = folder / f"process-{process}"
    own.mkdir(parents=True, exist_ok=True)
    for store in stores:
        store.save(own)
    if log_z is not None:
        save_tensors({"log_z": log_z.cpu().contiguous()}, own / "log_z.safetensors")


def load_state(folder: Path, process: int, stores: Sequence[Store], log_z: Tensor | None) -> None:
    """Read what `save_state` wrote. Raises CheckpointError."""
    own = folder / f"process-{process}"
    for store in stores:
        store.load(own)
    if log_z is not None:
        with reading(own, "log_z"):
            log_z.copy_(load_file(str(own / "log_z.safetensors"))["log_z"].to(log_z.device))


def save_optimizer(folder: Path, process: int, optimizer: Any) -> None:
    """Write one process's part of the state of an optimizer of sharded weights."""
    own = folder / f"process-{process}"
    own.mkdir(parents=True, exist_ok=True)
    torch.save(local(optimizer.state_dict()), own / OPTIMIZER)


def load_optimizer(folder: Path, process: int, optimizer: Any) -> None:
    """Read what `save_optimizer` wrote. Raises OSError, ValueError and the errors of torch.load."""
    state = torch.load(folder / f"process-{process}" / OPTIMIZER, map_location="cpu", weights_only=True)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, found in state["state"].items():
        state["state"][number] = {name: sharded_as(weights[number], x) for name, x in found.items()}
    optimizer.load_state_dict(state)


@contextlib.contextmanager
def reading(folder: str | Path | None, what: str) -> Iterator[None]:
    """Turns any error of a reader in the block into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{folder}: {what} was not read, because it contains objects other than tensors and numbers, which could "
            f"run code; resume from a checkpoint that you made, or {START_OVER}"
        ) from e
    except UNREADABLE as e:
        reason = str(e).split("\n")[0][:200]
        raise CheckpointError(
            f"{folder}: cannot read {what} ({type(e).__name__}: {reason}); resume from an earlier checkpoint, or "
            f"{START_OVER}"
        ) from e


@contextlib.contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Turns the error of a full disk into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if not is_disk_full(e):
            raise
        free = shutil.disk_usage(output_dir).free / 2**20
        last = next((p for p in reversed(begun(output_dir)) if damage(p) is None), None)
        then = f"; then resume_from_checkpoint=True (--resume) continues from {last.name}" if last else ""
        raise CheckpointError(
            f"no room to write into {output_dir}: its disk (or a quota) is full, {free:.0f} MB are free. Earlier saves "
            f"are intact. Free some space, or keep fewer checkpoints (save_total_limit){then}"
        ) from e


def seal(folder: Path, processes: int) -> None:
    """Write the manifest of a checkpoint, after every process has written its part."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    follow_umask(*files)
    found = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _hash(file)}
        for file in files
    }
    manifest = json.dumps({"processes": processes, "files": found}, indent=1)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed; None if it is complete and unchanged."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError as e:
        missing = Path(e.filename).name
        return f"has no {missing}: its writing was interrupted, or another version made it"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"has a damaged {STATE} or {MANIFEST} ({e})"
    if not isinstance(state, dict) or not isinstance(files, dict):
        return f"has a damaged {STATE} or {MANIFEST}"
    for name, seen in files.items():
        file = folder / name
        if not file.is_file():
            return f"has no {name}"
        if (size := file.stat().st_size) != seen["bytes"]:
            return f"is damaged: {name} has {size} of {seen['bytes']} bytes"
        if _hash(file) != seen["sha256"]:
            return f"is damaged: {name} was changed after it was written"
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_over(folder: Path) -> bool:
    """Had training ended at this checkpoint? (`Trainer` would train one more step.) Raises CheckpointError."""
    with reading(folder, STATE):
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def begun(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, complete or not."""
    numbered = [
        (int(m.group(1)), p)
        for p in output_dir.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [p for _, p in sorted(numbered)]


def find(wanted: str | Path | Literal[True], output_dir: Path) -> Path:
    """The checkpoint to resume: the wanted one, or for True the newest complete one of `output_dir`, with a warning
    about newer ones that are not complete. Raises CheckpointError if there is none."""
    bad: list[str] = []
    for folder in reversed(begun(output_dir)) if wanted is True else [Path(wanted)]:
        why = damage(folder)
        if why is None:
            if bad:
                logger.warning("resuming from %s, because %s", folder, "; ".join(bad))
            return folder
        bad.append(f"{folder.name if wanted is True else folder} {why}")
    if wanted is True:
        whose = (
            f": {'; '.join(bad)}; {START_OVER}" if bad else "; leave resume_from_checkpoint (--resume) out"
        )
        raise CheckpointError(f"{output_dir} holds no complete checkpoint{whose}")
    whole = [p for p in begun(Path(wanted).parent) if damage(p) is None]
    raise CheckpointError(f"{bad[0]}; {f'resume from {whole[-1]}' if whole else START_OVER}")
