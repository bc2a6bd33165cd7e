"""Files that are whole or absent, and as open to others as the umask says."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader, or a run cut short, never sees half a file."""
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
    save_file(tensors, str(path))
    follow_umask(path)


def follow_umask(*paths: Path) -> None:
    """safetensors writes through a temporary file, which is its owner's alone: give it the mode of any other."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        with contextlib.suppress(OSError):  # a disk without modes
            path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def replacing(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files then take the place of those in `folder`, `last` at the end. What is cut
    short while it is written leaves `folder` as it was."""
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
    """Was this raised because there was no room to write? torch and safetensors say so in words alone."""
    if isinstance(error, OSError):
        return error.errno in FULL
    text = str(error)
    return any(f"(os error {n})" in text for n in FULL) or "inline_container.cc" in text
