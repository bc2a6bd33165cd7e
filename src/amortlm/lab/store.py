"""Runs in a folder: a file each, so that an interruption loses only the last, and several processes can share the work.

DIR/settings.json               what the runs in DIR share; other settings need another DIR
DIR/runs/METHOD-seedK.json      a finished run, with all its records
DIR/work/METHOD-seedK/          checkpoints of an unfinished run, locked by the process that works on it
DIR/results.json, digest.json, README.md     a report of everything finished (`amortlm.lab.report`)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from amortlm.errors import ConfigError
from amortlm.files import write_text
from amortlm.lab.experiment import Run
from amortlm.lab.overrides import flat

NUMBER = r"(?:-?\d[^\s,]*|null|true|false)"
# A list or a mapping of numbers alone. Strings hold no raw line break, so only structure begins with one.
FLAT = re.compile(rf'\[(?:\n *{NUMBER},?)+\n *\]|\{{(?:\n *"[^"\\\n]*": {NUMBER},?)+\n *\}}')


@dataclass(frozen=True)
class Store:
    """A folder of runs. identity: JSON of the settings that all of them share; runs of other settings are refused."""

    folder: Path
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def file(self, method: str, seed: int) -> Path:
        return self.folder / "runs" / f"{_name(method, seed)}.json"

    def work(self, method: str, seed: int) -> Path:
        return self.folder / "work" / _name(method, seed)

    def lock(self, method: str, seed: int) -> Path:
        return self.folder / "work" / f"{_name(method, seed)}.lock"

    def finished(self) -> dict[tuple[str, int], Run]:
        """The runs that the folder holds. Raises ConfigError where they were made with other settings, or where the
        folder holds a report without its runs."""
        remedy = f"give another --output, or delete {self.folder}"
        found, summary = read_json(self.folder / "settings.json"), read_json(self.folder / "results.json")
        begun = any(p.is_file() for part in ("runs", "work") for p in (self.folder / part).rglob("*"))
        if begun and found is not None and found != self.identity:
            difference = _difference(found, self.identity)
            raise ConfigError(f"{self.folder} holds runs of other settings ({difference}); {remedy}")
        if summary and summary.get("runs") and not (self.folder / "runs").exists():
            raise ConfigError(
                f"{self.folder}/results.json is a report without its runs, which new runs would replace; {remedy}"
            )
        done = {}
        for file in sorted((self.folder / "runs").glob("*-seed*.json")):
            run = read_json(file)
            if run is None:
                continue
            if run.get("key") != self.key:
                raise ConfigError(f"{file} was made with other settings; {remedy}")
            done[run["method"], run["seed"]] = run
        return done

    def claim(self) -> None:
        """Write down what the runs share, before the first one.

        Raises ConfigError where another process has just begun with other settings.
        """
        with self.alone():
            self.finished()
            if read_json(self.folder / "settings.json") != self.identity:
                # Any checkpoints there were made with unknown settings.
                shutil.rmtree(self.folder / "work", ignore_errors=True)
                write_json(self.folder / "settings.json", self.identity)

    def save(self, run: Run) -> None:
        """Write a finished run, whole or not at all, and delete its checkpoints."""
        method, seed = run["method"], run["seed"]
        write_json(self.file(method, seed), {"key": self.key, **run})
        shutil.rmtree(self.work(method, seed), ignore_errors=True)

    @contextlib.contextmanager
    def taken(self, method: str, seed: int) -> Iterator[bool]:
        """Whether this run is ours to make. The system frees the lock of a process that ends, however it ends."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_locked(self.lock(method, seed), timeout=0))
            except Timeout:
                yield False
                return
            yield read_json(self.file(method, seed)) is None

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time writes what all share."""
        return _locked(self.folder / ".lock")


@contextlib.contextmanager
def _locked(file: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock and delete its file afterwards; a process that waited for it makes a new one. Raises Timeout."""
    lock = FileLock(file)
    lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            file.unlink()
        lock.release()


def _name(method: str, seed: int) -> str:
    return re.sub(r"[^\w.-]+", "-", method) + f"-seed{seed}"


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs: "settings.steps: 3 there, 250 now"."""
    there, now = dict(flat(old)), dict(flat(new))
    for name in sorted(there | now):
        if there.get(name) != now.get(name):
            return f"{name}: {there.get(name)!r} there, {now.get(name)!r} now"
    return "another layout"


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None for a file that is absent or damaged, so that a damaged run is made again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
