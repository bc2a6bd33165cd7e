"""amortlm new: a commented YAML file to start from."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from amortlm.cli.checks import check_file
from amortlm.errors import ConfigError


def run(args: Namespace) -> None:
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
