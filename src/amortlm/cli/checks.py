"""Checks of options and files, before any work is done; those of files also before libraries are imported, which takes
seconds."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from amortlm.data import load_rows
from amortlm.errors import ConfigError
from amortlm.files import check_run
from amortlm.posterior_file import is_repository, parsed


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


def check_inputs(args: Namespace) -> None:
    """Raise the errors of files that a command reads and that do not exist or do not parse, without torch."""
    if args.command in ("train", "launch"):
        _check_spec(args.spec, args.data)
    elif getattr(args, "data", None) and args.command != "reproduce":
        load_rows(args.data)
    if getattr(args, "folder", None) and (args.command == "push" or not _may_be_on_the_hub(args.folder)):
        parsed(Path(args.folder))
    for folder in getattr(args, "folders", ()):
        check_run(Path(folder))


def _check_spec(name: str, data: str | None) -> None:
    from amortlm.lab.tasks import check_name
    from amortlm.train.spec import RunSpec

    if name.endswith((".yaml", ".yml")):
        spec = RunSpec.parsed(name).with_overrides(data=data)
        if isinstance(spec.data, str):
            load_rows(spec.data)
    else:
        check_name(name)


def _may_be_on_the_hub(name: str) -> bool:
    return not os.path.exists(name) and is_repository(name)
