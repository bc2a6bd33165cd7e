"""Checks of options, before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from amortlm.errors import ConfigError


def check_counts(*options: tuple[str, int | None]) -> None:
    for name, value in options:
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def check_folder(name: str | Path) -> None:
    """Raise ConfigError for an output folder that cannot be created or written, before any work is done."""
    folder = next(path for path in (Path(name), *Path(name).parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written" if folder.is_dir() else "is a file"
        raise ConfigError(f"cannot write to the folder {name}: {folder} {why}; give another --output")


def check_file(name: str) -> None:
    """Raise ConfigError for an output file that cannot be written; its folder must exist."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"cannot write the file {name}: {why}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write the file {name}: permission denied")
