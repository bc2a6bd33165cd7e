"""The diagnosis of a finished run, which a report shows: it needs the model, so it is kept in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amortlm.diagnostics.certificate import hash_adapter
from amortlm.errors import CheckpointError
from amortlm.files import DIAGNOSIS, write_text
from amortlm.posterior import Posterior
from amortlm.report.record import RunRecord
from amortlm.types import finite


def is_measured(folder: str | Path, n: int, seed: object) -> bool:
    """Does the folder hold the diagnosis of its present weights, from n samples with this seed?"""
    file = Path(folder) / DIAGNOSIS
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["of"] == _of(folder, n, seed))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measure(posterior: Posterior, folder: str | Path, n: int, *, seed: object = 0) -> None:
    """Diagnose the prompts that training looked at, from n samples each, and write diagnosis.json into the folder.

    Raises CheckpointError if training looked at none, and the errors of `Posterior.diagnose`."""
    rows = [look["row"] for look in RunRecord.read(folder).after]
    if not rows:
        raise CheckpointError(
            f"{folder}: no prompt was looked at in training; use amortlm evaluate with --data"
        )
    diagnosis = posterior.diagnose(rows, n, seed=seed)
    figures = [{"row": row, **found.to_dict()} for row, found in zip(rows, diagnosis.rows, strict=True)]
    text = json.dumps(finite({"of": _of(folder, n, seed), "rows": figures}), indent=1)
    write_text(Path(folder) / DIAGNOSIS, text + "\n")


def _of(folder: str | Path, n: int, seed: object) -> dict[str, Any]:
    return {"weights": hash_adapter(folder), "n": n, "seed": seed}
