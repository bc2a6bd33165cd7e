"""A certificate: a file that states how near a sampler was to its posterior, and allows anybody to check this again.

A certificate states that the gap of `amortlm.diagnostics.diagnose`, the smaller of KL(q || p) and KL(p || q), is at
most `mark` nats on each of a few rows: by its exact value if the support can be enumerated, else by its upper end at
`level`.

**Repeated looks.** Training measures the gap every few steps and stops at the first gap below the mark, so a wrong
measurement has many chances. Look k therefore has level 1 - (1 - level) / (k (k + 1)). Then the probability that
training stops although a true gap is above the mark is at most 1 - level, for any number of looks.

**Checking** takes fresh samples. When training stops, the upper end is just below the mark; from as many fresh samples
it would be above the mark half of the time. So a check takes TIMES[0] times as many samples as training. If the upper
end is still above the mark, but the lower end is not, the check takes TIMES[1] times as many. The check fails if the
true gap is closer to the mark than the interval is wide. Exact gaps may differ by TOLERANCE.
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
from typing import Any

from amortlm.diagnostics.diagnose import LEVEL, Diagnosis, Gold, RowDiagnosis, diagnose
from amortlm.errors import CheckpointError, ConfigError
from amortlm.files import CERTIFICATE
from amortlm.inference.correct import require_target
from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.targets.functions import NAMES
from amortlm.types import Row, finite, row_key

FILE = CERTIFICATE
FORMAT = 1
LIMIT = 5_000  # completions enumerated at a look: a look has to be faster than a diagnosis
TIMES = (4, 16)  # samples of a check, as multiples of those in training
MOST = 10**6  # samples for a row
TOLERANCE = 1e-3  # nats by which exact gaps may differ between machines and library versions
LIBRARIES = ("amortlm", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Certificate:
    """The measured gap, and everything that is needed to measure it again. Saved as JSON.

    mark             nats: the gap that was asked for (`stop_at_gap`)
    reached          nats: the largest gap of the rows
    level            probability with which every gap is at most the mark
    step, n, seed    the update after which the gap was measured, samples per row, seed
    rows, gold       the rows, and for each row the completions known to be good
    reports          the figures of each row (`RowDiagnosis.to_dict`)
    target           its JSON form; None if it has none (a function that cannot be imported by name)
    data_hash        of all training rows, in any order
    adapter_hash     of the weights beside the certificate
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
        """Read the certificate of a folder. Raises CheckpointError if it is missing, damaged or of another format."""
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
                f"{file} is missing or damaged ({e}); training with stop_at_gap writes it when it stops"
            ) from e

    def _check(self) -> None:
        """Raise TypeError for a value of another type than `save` writes."""
        right = {
            "mark": _positive(self.mark),
            "level": _positive(self.level) and self.level < 1,
            "n": type(self.n) is int and 1 <= self.n <= MOST,
            "rows": _listed(self.rows, dict) and len(self.rows) > 0,
            "gold": _listed(self.gold, list) and all(_listed(z, int) for row in self.gold for z in row),
            "reports": _listed(self.reports, dict),
            "target": self.target is None or _listed(self.target, dict),
        }
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
    """Whether a certificate still holds, and one line with the reason."""

    holds: bool
    line: str


def samples_for(mark: float) -> int:
    """Number of samples per row for an interval that is narrower than the mark (nats). Near the posterior the interval
    of n samples is about 20 / n nats wide. At most 4,096, so a mark below 0.01 needs exact gaps."""
    return min(4096, max(256, math.ceil(40 / mark)))


def look_level(look: int, level: float = LEVEL) -> float:
    """The level of look 1, 2, .. in training: the error rates of all looks sum to at most 1 - level."""
    return 1 - (1 - level) / (look * (look + 1))


def worst(diagnosis: Diagnosis) -> float:
    """The largest gap of the rows, nats; inf if one is unknown."""
    return max(row.gap for row in diagnosis.rows)


def issue(
    policy: Policy,
    target: Target,
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
    """Write the certificate of a diagnosis into `folder`, where the posterior is saved. data: all training rows."""
    certificate = Certificate(
        mark=mark,
        reached=worst(diagnosis),
        level=level,
        step=step,
        n=n,
        seed=seed,
        rows=[dict(row) for row in rows],
        gold=[[list(g) for g in row] for row in gold],  # type: ignore[arg-type]
        reports=[row.to_dict() for row in diagnosis.rows],
        **_stated(policy, target),
        data_hash=hash_rows(data),
        adapter_hash=hash_adapter(folder),
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    )
    certificate.save(folder)
    return certificate


def check(
    policy: Policy,
    target: Target | None,
    certificate: Certificate,
    *,
    seed: object = 0,
    data_hash: str | None = None,
    adapter_hash: str | None = None,
) -> Finding:
    """Measure the gap again, with fresh samples (module docstring).

    data_hash, adapter_hash: of the current data and weights, if known. If target, prompt, support or data have changed,
    the certificate does not apply, and nothing is measured. If the gap is too large and the adapter is another one, the
    finding says so. Raises ConfigError without a target.
    """
    now = json.loads(json.dumps(_stated(policy, target), default=str))
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
            policy,
            require_target(target),
            certificate.rows,
            n,
            seed=("check", seed),
            level=level,
            gold=certificate.gold,
            limit=LIMIT,
        )
        bad = [i for i, r in enumerate(diagnosis.rows) if not r.gap <= certificate.mark + _slack(r)]
        if not bad:
            gap = f"gap {worst(diagnosis):.3g} <= {certificate.mark:g} nats"
            return Finding(True, f"certificate holds: {gap} on {_rows(certificate)}, {n} samples each")
        if any(r.gap_low > certificate.mark + _slack(r) for r in diagnosis.rows):
            break
    return Finding(False, _complaint(certificate, diagnosis, bad, adapter_hash))


def _complaint(
    certificate: Certificate, diagnosis: Diagnosis, bad: list[int], adapter_hash: str | None
) -> str:
    row = max(bad, key=lambda i: diagnosis.rows[i].gap)
    worst = diagnosis.rows[row]
    low, high = worst.gap_low, worst.gap
    found = (
        f"{high:.3g}" if low == high else f"between {low:.3g} and {high:.3g} (truth: {worst.truth.source})"
    )
    if _log_z_moved(worst, certificate.reports[row]):
        why = "log Z changed: the same target has another model or verifier"
    elif adapter_hash not in (None, certificate.adapter_hash):
        why = "the adapter is not the one that was certified"
    else:
        why = "adapter and target are as certified: the libraries or the hardware changed, or the gap is at the mark"
    return (
        f"certificate does not hold: gap of row {row} {found} nats, mark {certificate.mark:g}, "
        f"{len(bad)} of {_rows(certificate)} above it; {why}"
    )


def _log_z_moved(now: RowDiagnosis, old: dict[str, Any]) -> bool:
    """Did log Z change? It depends only on the target, so exact values must agree, and intervals must overlap."""
    if now.exact_log_z is not None and "exact_log_z" in old:
        return abs(now.exact_log_z - old["exact_log_z"]) > TOLERANCE * max(1.0, abs(old["exact_log_z"]))
    low, high = old["log_z_low"], old["log_z_high"]  # None means infinite
    is_above = high is not None and now.bounds.log_z.lower > high
    return is_above or (low is not None and now.bounds.log_z.upper < low)


def _slack(row: RowDiagnosis) -> float:
    return 0.0 if row.distance is None else TOLERANCE


def _rows(certificate: Certificate) -> str:
    return f"{len(certificate.rows)} row{'s' if len(certificate.rows) > 1 else ''}"


def _stated(policy: Policy, target: Target | None) -> dict[str, Any]:
    """Prompt, support and target in their JSON form."""
    try:
        spec = None if target is None else target.to_spec()
    except ConfigError:
        spec = None
    return {"prompt": policy.prompt.source, "support": policy.support_spec.stated(), "target": spec}


def _renamed(value: Any) -> Any:
    """A copy of `value` with the current names of amortlm's own functions, and without weights of 1: a target of one
    term has none before it is saved, and one of 1 when it is loaded."""
    if isinstance(value, dict):
        return {k: _renamed(v) for k, v in value.items() if (k, v) != ("weight", 1.0)}
    if isinstance(value, list):
        return [_renamed(v) for v in value]
    return NAMES.get(value, value) if isinstance(value, str) else value


def found(folder: str | Path) -> Certificate | None:
    """The certificate in a folder, if there is one about the weights there."""
    try:
        certificate = Certificate.load(folder)
    except CheckpointError:
        return None
    return certificate if certificate.adapter_hash == hash_adapter(folder) else None


def hash_file(folder: str | Path) -> str:
    """A hash of the certificate in a folder, by which its copy can be known."""
    return hashlib.sha256((Path(folder) / FILE).read_bytes()).hexdigest()


def hash_rows(rows: Sequence[Row]) -> str:
    """A hash of the rows, independent of their order."""
    return hashlib.sha256(" ".join(sorted(map(row_key, rows))).encode()).hexdigest()


def hash_adapter(folder: str | Path) -> str:
    """A hash of the weights saved in a folder."""
    found = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()
