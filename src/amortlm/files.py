"""Files that are written completely or not at all, with the permissions of the umask."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from amortlm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Files in the folder of a run that training writes and a report reads, or the reverse.
RUN, STATE, LOOKS = "run.json", "trainer_state.json", "looks.jsonl"
CERTIFICATE, DIAGNOSIS, REPORT = "certificate.json", "diagnosis.json", "report.html"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_run(folder: Path) -> None:
    """Raise CheckpointError for a folder without a run."""
    if not (folder / RUN).exists():
        raise CheckpointError(
            f"{folder} holds no run ({RUN}): give a folder that `amortlm train` or GFNTrainer wrote"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: no reader, and no interruption, ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file."""
    from safetensors.torch import save_file  # not needed by those who only look for files

    save_file(tensors, str(path))
    follow_umask(path)


def follow_umask(*paths: Path) -> None:
    """Set the usual file mode: safetensors writes through a temporary file that only its owner can read."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def replacing(folder: Path, last: str) -> Iterator[Path]:
    """Yields a folder to write into. Its files then replace those in `folder`, the file `last` at the end. If writing
    is interrupted, `folder` does not change."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        files = (path.relative_to(part) for path in part.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: (file.name == last, file)):
            (folder / file).parent.mkdir(exist_ok=True)
            (part / file).replace(folder / file)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Was this error raised because the disk is full? Errors of torch and safetensors show this only in their text."""
    if isinstance(error, OSError):
        return error.errno in FULL
    text = str(error)
    return any(f"(os error {n})" in text for n in FULL) or "inline_container.cc" in text
