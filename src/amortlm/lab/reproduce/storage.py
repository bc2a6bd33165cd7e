"""Results on disk: JSON without NaN, and where a run was made."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from amortlm.files import write_text

NUMBER = r"(?:-?\d[^\s,]*|null|true|false)"
# A list or a mapping of numbers alone. Strings hold no raw line break, so only structure begins with one.
FLAT = re.compile(rf'\[(?:\n *{NUMBER},?)+\n *\]|\{{(?:\n *"[^"\\\n]*": {NUMBER},?)+\n *\}}')
PACKAGES = ("amortlm", "torch", "transformers", "peft", "trl", "numpy")


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Indented, with numbers that stand together on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, FLAT.sub(lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n")


def environment() -> dict[str, Any]:
    """Where a run was made: package versions, Python, processor, threads, commit."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": versions,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree ("+" where files differ from it), or None if it is no checkout of ours."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        out = [
            subprocess.run(
                [*git, *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return out[0][:12] + ("+" if out[1] else "")
