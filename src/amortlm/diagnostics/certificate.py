"""A certificate: on these rows the sampler was within so many nats of its posterior, in a file to check again.

What is certified is the gap of `amortlm.diagnostics.diagnose`, the smaller of KL(q || p) and KL(p || q), of the worst
of a few rows: exact where the support can be enumerated, else an upper end at `level`.

**Looking often.** Training looks every few steps and stops at the first gap below the mark, so luck gets many
chances. Look k therefore has level 1 - (1 - level) / (k (k + 1)): whenever it stops, a gap above the mark passes with
probability at most 1 - level.

**Checking.** Fresh samples, TIMES[0] times as many as in training, for at the moment of stopping the upper end lies
just below the mark and would, with as many samples, lie above it half of the time. Are they above it, TIMES[1] times as
many decide, unless already the lower ends exclude the mark. A sampler whose true gap is closer to the mark than the
interval of that many samples is wide does fail: its certificate was luck. Exact gaps must repeat to TOLERANCE.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.diagnostics.diagnose import LEVEL, Diagnosis, Gold, diagnose
from amortlm.errors import CheckpointError, ConfigError
from amortlm.targets.functions import NAMES
from amortlm.types import Row, finite, row_key

if TYPE_CHECKING:
    from amortlm.posterior import Posterior

FILE = "certificate.json"
FORMAT = 1
LIMIT = 5_000  # completions enumerated in the middle of a training: less than the usual limit
TIMES = (4, 16)
MOST = 10**6  # samples a row
TOLERANCE = 1e-3  # nats between machines and library versions
LIBRARIES = ("amortlm", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Certificate:
    """What was measured, and all that it takes to measure it again. Saved as JSON.

    mark, reached    nats: the gap asked for, and that of the worst row
    level            probability at which no row has a gap above the mark, however often was looked
    step, n, seed    update, samples a row and seed of the measurement
    rows, gold, reports   the rows, completions that were taken for known to be good, the full figures
    target           its JSON form; None if it has none (a function without an import path)
    data_hash        of all training rows, whatever their order; adapter_hash: of the weights beside the certificate
    """

    mark: float
    reached: float
    level: float
    step: int
    n: int
    seed: int
    rows: list[dict[str, Any]]
    gold: list[list[list[int]]]
    reports: list[dict[str, Any]]
    prompt: Any
    support: dict[str, Any]
    target: list[dict[str, Any]] | None
    data_hash: str
    adapter_hash: str
    versions: dict[str, str]
    quantity: str = "min(KL(q||p), KL(p||q)), worst row, nats"
    format: int = FORMAT

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(
            json.dumps(finite(asdict(self)), indent=2, default=str) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: str | Path) -> Certificate:
        """Raises CheckpointError where there is none, or another format."""
        file = Path(folder) / FILE
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            missing = {f.name for f in fields(cls)} ^ set(saved)
            if missing or saved["format"] != FORMAT:
                raise ValueError(f"format {saved.get('format')}, keys {sorted(missing)} missing or unknown")
            found = cls(**saved)
            found._check()
            return found
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
            raise CheckpointError(
                f"{file} is missing or damaged ({e}); a training with stop_at_gap writes one when it stops"
            ) from e

    def _check(self) -> None:
        """Raise TypeError for a value of another kind than `save` writes."""
        right = {
            "mark": _positive(self.mark),
            "level": _positive(self.level) and self.level < 1,
            "n": type(self.n) is int and 1 <= self.n <= MOST,
            "rows": _listed(self.rows, dict) and len(self.rows) > 0,
            "gold": _listed(self.gold, list) and all(_listed(z, int) for row in self.gold for z in row),
            "reports": _listed(self.reports, dict),
            "target": self.target is None or _listed(self.target, dict),
        }
        right["gold"] = right["gold"] and all(_listed(z, int) for row in self.gold for z in row)
        lengths = {len(x) for x in (self.rows, self.gold, self.reports) if isinstance(x, list)}
        wrong = [name for name, is_right in right.items() if not is_right]
        if wrong or len(lengths) > 1:
            raise TypeError(
                f"{wrong[0]} cannot be {str(getattr(self, wrong[0]))[:80]}" if wrong else "rows are missing"
            )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _listed(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(v) is kind for v in value)


@dataclass(frozen=True)
class Finding:
    """Does a certificate still hold? `line` says why, in one line."""

    holds: bool
    line: str


def samples_for(mark: float) -> int:
    """How many samples a row needs for an interval that is narrower than the mark: its width is about 20 / n nats for
    a sampler near the posterior. At most 4,096: a mark below 0.01 can only be met where gaps are exact."""
    return min(4096, max(256, math.ceil(40 / mark)))


def look_level(look: int, level: float = LEVEL) -> float:
    """The level of look 1, 2, .. of a training: the shares of 1 - level sum to at most 1 - level."""
    return 1 - (1 - level) / (look * (look + 1))


def worst(diagnosis: Diagnosis) -> float:
    """The largest gap of the rows, nats; inf where one is unknown."""
    return max(r["gap"] for r in diagnosis.reports)


def issue(
    posterior: Posterior,
    diagnosis: Diagnosis,
    folder: str | Path,
    *,
    mark: float,
    level: float,
    step: int,
    n: int,
    seed: int,
    rows: Sequence[Row],
    gold: Gold,
    data: Sequence[Row],
) -> Certificate:
    """The certificate of a diagnosis of the posterior saved in `folder`; written there. data: all training rows."""
    certificate = Certificate(
        mark=mark,
        reached=worst(diagnosis),
        level=level,
        step=step,
        n=n,
        seed=seed,
        rows=[dict(row) for row in rows],
        gold=[[list(g) for g in row] for row in gold],  # type: ignore[arg-type]
        reports=diagnosis.reports,
        **_stated(posterior),
        data_hash=hash_rows(data),
        adapter_hash=hash_adapter(folder),
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    )
    certificate.save(folder)
    return certificate


def check(
    posterior: Posterior,
    certificate: Certificate,
    *,
    seed: object = 0,
    data_hash: str | None = None,
    adapter_hash: str | None = None,
) -> Finding:
    """Measure the gap anew, with fresh samples (module docstring). data_hash, adapter_hash: of what is there now, if
    known. A changed target, prompt, support or data fails before anything is measured; another adapter is named
    where the gap is not what it was. Raises ConfigError without a target."""
    now = json.loads(json.dumps(_stated(posterior), default=str))
    then = {name: getattr(certificate, name) for name in now}
    changed = [name for name in now if _renamed(now[name]) != _renamed(then[name])]
    if data_hash not in (None, certificate.data_hash):
        changed.append("data")
    if changed:
        names = " and ".join(changed)
        return Finding(False, f"certificate does not apply: {names} changed since it was written")
    for times in TIMES:
        n = times * certificate.n
        level = 1 - (1 - certificate.level) / len(certificate.rows)
        diagnosis = diagnose(
            posterior,
            certificate.rows,
            n,
            seed=("check", seed),
            level=level,
            gold=certificate.gold,
            limit=LIMIT,
        )
        bad = [i for i, r in enumerate(diagnosis.reports) if not r["gap"] <= certificate.mark + _slack(r)]
        if not bad:
            gap = f"gap {worst(diagnosis):.3g} <= {certificate.mark:g} nats"
            return Finding(True, f"certificate holds: {gap} on {_rows(certificate)}, {n} samples each")
        if any(_lowest(r) > certificate.mark + _slack(r) for r in diagnosis.reports):
            break
    return Finding(False, _complaint(certificate, diagnosis, bad, adapter_hash))


def _complaint(
    certificate: Certificate, diagnosis: Diagnosis, bad: list[int], adapter_hash: str | None
) -> str:
    row = max(bad, key=lambda i: diagnosis.reports[i]["gap"])
    report, old = diagnosis.reports[row], certificate.reports[row]
    low, high = _lowest(report), report["gap"]
    found = f"{high:.3g}" if low == high else f"between {low:.3g} and {high:.3g} (truth: {report['truth']})"
    if _log_z_moved(report, old):
        why = "log Z is not what it was: another model or verifier behind the same target"
    elif adapter_hash not in (None, certificate.adapter_hash):
        why = "the adapter is not the one that was certified"
    else:
        why = "adapter and target are as certified: other library versions or hardware, or a gap at the mark"
    return (
        f"certificate does not hold: gap of row {row} {found} nats, mark {certificate.mark:g}, "
        f"{len(bad)} of {_rows(certificate)} above it; {why}"
    )


def _log_z_moved(now: dict[str, Any], old: dict[str, Any]) -> bool:
    """log Z belongs to the target alone, whatever the sampler: exact values must agree, intervals overlap."""
    if "exact_log_z" in now and "exact_log_z" in old:
        return abs(now["exact_log_z"] - old["exact_log_z"]) > TOLERANCE * max(1.0, abs(old["exact_log_z"]))
    ends = [
        (
            -math.inf if r["log_z_low"] is None else r["log_z_low"],
            math.inf if r["log_z_high"] is None else r["log_z_high"],
        )
        for r in (now, old)
    ]
    return max(low for low, _ in ends) > min(high for _, high in ends)


def _lowest(report: dict[str, Any]) -> float:
    """What the gap is at least."""
    return report["gap"] if "kl_qp" in report else min(report["kl_qp_low"], report["kl_pq_low"])


def _slack(report: dict[str, Any]) -> float:
    return TOLERANCE if "kl_qp" in report else 0.0


def _rows(certificate: Certificate) -> str:
    return f"{len(certificate.rows)} row{'s' if len(certificate.rows) > 1 else ''}"


def _stated(posterior: Posterior) -> dict[str, Any]:
    """prompt, support and target in their JSON form."""
    policy = posterior.policy
    try:
        target = posterior.target.to_spec() if posterior.target is not None else None
    except ConfigError:
        target = None
    return {"prompt": policy.prompt.source, "support": policy.support_spec.to_dict(), "target": target}


def _renamed(value: Any) -> Any:
    """With the functions that ship by their names of today."""
    if isinstance(value, dict):
        return {k: _renamed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v) for v in value]
    return NAMES.get(value, value) if isinstance(value, str) else value


def hash_rows(rows: Sequence[Row]) -> str:
    """A name for the rows, whatever their order."""
    return hashlib.sha256(" ".join(sorted(map(row_key, rows))).encode()).hexdigest()


def hash_adapter(folder: str | Path) -> str:
    """A name for the weights saved in a folder."""
    found = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()
