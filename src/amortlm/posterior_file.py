"""`posterior.json`, which states a saved posterior: found and parsed without a library, so that the command line can
answer for a wrong folder at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from amortlm.errors import CheckpointError
from amortlm.files import RUN

FILE = "posterior.json"
FORMAT = 1
REPOSITORY = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", re.ASCII)  # of the hub
LARGEST = 64 * 2**20  # bytes


def parsed(folder: Path) -> dict[str, Any]:
    """The content of the file, a mapping; `amortlm.saved.read` also checks its values. Raises CheckpointError."""
    file = folder / FILE
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        spec = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(spec, dict):
            raise TypeError(f"it holds a {type(spec).__name__}, not a mapping")
        found = spec["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise damaged(folder, e) from e
    if type(found) is int and found != FORMAT:
        raise CheckpointError(
            f"{folder}: {FILE} has format {found}, this version reads format {FORMAT}; load it with the version "
            "of amortlm that saved it"
        )
    return spec


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for a folder whose file is missing or not as it was written."""
    why = f"no {error}" if isinstance(error, KeyError) else error
    return CheckpointError(
        f"{folder}: {FILE} is missing or damaged ({why}); this is not a complete saved posterior. {_remedy(folder)}"
    )


def is_repository(name: str) -> bool:
    """May the name be that of a posterior on the hub, user/name?"""
    return name.count("/") == 1 and REPOSITORY.fullmatch(name) is not None


def _remedy(folder: Path) -> str:
    begun = (folder / RUN).is_file()  # training writes it at its beginning
    if begun and not (folder / FILE).exists():
        return "Its training has not ended: train with --resume (resume_from_checkpoint=True)"
    return "Give a folder that `amortlm train` or save_pretrained wrote"
