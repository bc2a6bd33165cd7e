"""Commands that need no model: they start at once, because this module imports nothing slow."""

from __future__ import annotations

import os
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path

from amortlm.errors import ConfigError, MissingExtraError


def new(args: Namespace) -> None:
    path = Path(args.file)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{path}: amortlm train takes files that end in .yaml: write {path.with_suffix('.yaml')}"
        )
    check_file(args.file)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write((Path(__file__).parent / "new.yaml").read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{path} exists, and is not written over: give another name") from None
    print(f"wrote {path}\ntry:  {shlex.join(['amortlm', 'train', str(path)])}")


def completion(args: Namespace) -> None:
    try:
        import shtab
    except ImportError as e:
        raise MissingExtraError("completion needs shtab: pip install 'amortlm[completion]'") from e
    _name_files(args.parser, shtab.FILE)
    print(shtab.complete(args.parser, args.shell))


def _name_files(parser: ArgumentParser, kind: object) -> None:
    """Mark the arguments that are files or folders, for their completion."""
    for action in parser._actions:
        for part in action.choices.values() if isinstance(action.choices, dict) else ():
            _name_files(part, kind)
        if action.dest in ("spec", "folder", "data", "output", "file"):
            vars(action)["complete"] = kind


QUICK = {"new": new, "completion": completion}


def check_file(name: str) -> None:
    """Raise ConfigError for an output file that cannot be written; its folder must exist."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"cannot write the file {name}: {why}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write the file {name}: permission denied")
