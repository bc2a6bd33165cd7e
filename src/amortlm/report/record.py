"""What the folder of a run says about it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amortlm.errors import CheckpointError
from amortlm.files import CERTIFICATE, DIAGNOSIS, LOOKS, RUN, STATE, check_run

Json = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run, read from its folder. Figures that are not finite are None.

    about        model, target, prompt and support as written, environment
    settings     of the run's `GFNConfig`, without those that do not change its result
    history      entries of the trainer's log, ascending in `step`
    looks        the diagnosed prompts, ascending in `step`: step, row and the keys of `Look.to_dict`
    diagnosis    figures of `RowDiagnosis.to_dict` with the row, from `amortlm report`; empty before
    certificate  content of certificate.json, or None
    """

    name: str
    finished: bool
    about: Json
    settings: Json
    history: list[Json]
    looks: list[Json]
    diagnosis: list[Json]
    certificate: Json | None

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Raises CheckpointError for a folder without a run, and for damaged files."""
        folder = Path(folder)
        check_run(folder)
        run = _read(folder / RUN)
        stated = run.get("identity")
        stated = stated if isinstance(stated, dict) else {}
        return cls(
            name=folder.resolve().name,
            finished=bool(run.get("finished")),
            about={**_shown(stated), **(run.get("about") or {})},
            settings=stated.get("settings") or {},
            history=_history(folder),
            looks=_looks(folder / LOOKS),
            diagnosis=_read(folder / DIAGNOSIS)["rows"] if (folder / DIAGNOSIS).exists() else [],
            certificate=_read(folder / CERTIFICATE) if (folder / CERTIFICATE).exists() else None,
        )

    @property
    def before(self) -> list[Json]:
        """A look for each diagnosed prompt before the first update; empty if nobody looked (`diagnose_steps=0`)."""
        return [look for look in self.looks if look["step"] == 0]

    @property
    def after(self) -> list[Json]:
        """The last look for each diagnosed prompt after an update; empty before any."""
        last = max((look["step"] for look in self.looks), default=0)
        return [look for look in self.looks if look["step"] == last > 0]


def _shown(stated: Json) -> Json:
    """Of a run that an earlier version wrote: its identity in place of what its author wrote."""
    unknown: Json = {"rows": None, "chosen": [], "environment": None}
    return {**unknown, **{name: stated.get(name) for name in ("model", "target", "prompt", "support")}}


def _history(folder: Path) -> list[Json]:
    """The log of the finished run, else that of its last checkpoint."""
    states = [
        folder / STATE,
        *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda p: p.stat().st_mtime)[::-1],
    ]
    found = next((path for path in states if path.exists()), None)
    return [] if found is None else _read(found).get("log_history", [])


def _read(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, not a mapping")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path} is damaged ({e}): delete it, or train the run again") from e


def _looks(path: Path) -> list[Json]:
    """Of two looks at the same step and prompt the later one, as after a resume. A line that an interruption cut short
    is left out."""
    found: dict[tuple[int, str], Json] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            look = json.loads(line)
            found[int(look["step"]), json.dumps(look["row"], sort_keys=True)] = look
    return sorted(found.values(), key=lambda look: look["step"])
