"""What a checkpoint holds beyond `transformers.Trainer`'s own files, and whether it is complete."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amortlm.errors import CheckpointError

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
PART = "process.json"  # written last into the part of each process


class Store(Protocol):
    """What a process has gathered: the replay buffer, the reward memory."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def save_state(
    folder: Path, process: int, processes: int, stores: Sequence[Store], log_z: Tensor | None
) -> None:
    """Write each process's stores, and learned log Z, into a checkpoint folder. processes: how many there are."""
    own = folder / f"process-{process}"
    own.mkdir(parents=True, exist_ok=True)
    for store in stores:
        store.save(own)
    if log_z is not None:
        save_file({"log_z": log_z.cpu().contiguous()}, str(own / "log_z.safetensors"))
    (own / PART).write_text(json.dumps({"processes": processes}), encoding="utf-8")


def load_state(
    folder: Path, process: int, processes: int, stores: Sequence[Store], log_z: Tensor | None
) -> None:
    """Read what `save_state` wrote. Raises CheckpointError, also where another number of processes wrote it."""
    saved = _processes(folder)
    if saved != processes:
        raise CheckpointError(
            f"{folder} is of a run of {saved} process{'es' * (saved != 1)}, each with its own replay buffer, and this "
            f"one has {processes}: resume it with torchrun --nproc_per_node {saved}, or train from the start"
        )
    own = folder / f"process-{process}"
    for store in stores:
        store.load(own)
    if log_z is not None:
        try:
            log_z.copy_(load_file(str(own / "log_z.safetensors"))["log_z"].to(log_z.device))
        except (OSError, KeyError, RuntimeError, SafetensorError) as e:
            raise CheckpointError(f"{own}: cannot read log_z ({e}); resume from an earlier checkpoint") from e


def _processes(folder: Path) -> int:
    """How many processes wrote their parts of a checkpoint; 0 where one is missing."""
    try:
        count = int(json.loads((folder / "process-0" / PART).read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return count if all((folder / f"process-{i}" / PART).exists() for i in range(count)) else 0


def complete(folder: Path) -> bool:
    """Was this checkpoint written to its end, by every process?"""
    try:
        json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return False
    written = any(folder.glob("*.safetensors")) and (folder / "optimizer.pt").exists()
    return written and _processes(folder) > 0


def list_complete(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    numbered = [
        (int(m.group(1)), p)
        for p in output_dir.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [p for _, p in sorted(numbered) if complete(p)]


def find(wanted: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint to resume from. Raises CheckpointError if the one asked for is missing or cut short."""
    if not wanted:
        return None
    run = Path(str(output_dir))
    if wanted is True:
        usable = list_complete(run)
        if not usable:
            raise CheckpointError(f"{run} holds no complete checkpoint; train without resume_from_checkpoint")
        broken = [p.name for p in run.glob("checkpoint-*") if not complete(p)]
        if broken:
            logger.warning("ignoring checkpoints that were cut short: %s", ", ".join(sorted(broken)))
        return str(usable[-1])
    folder = Path(wanted)
    if not complete(folder):
        usable = list_complete(folder.parent)
        remedy = f"resume from {usable[-1]}" if usable else "train from the start"
        raise CheckpointError(f"{folder} is missing or was cut short while it was written; {remedy}")
    return str(folder)
