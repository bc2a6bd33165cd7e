"""The verdict on a run in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from amortlm.diagnostics.diagnose import AVOID, CORRECT, TRUST
from amortlm.report.record import Json, RunRecord


@dataclass(frozen=True)
class Verdict:
    """kind: "good", "correct", "bad" or "open" (not measured). headline and detail: sentences for people."""

    kind: str
    headline: str
    detail: str


def verdict(run: RunRecord) -> Verdict:
    if not run.finished:
        return Verdict("open", "Training is not finished.", _in_training(run))
    if not run.diagnosis:
        return Verdict(
            "open",
            "Trained, not yet measured.",
            f"{_in_training(run)} `amortlm report` without --quick measures the distance from the posterior.",
        )
    return judged(run.diagnosis, _certified(run))


def judged(rows: list[Json], certified: str = "") -> Verdict:
    """The verdict on diagnosed prompts, from figures of `RowDiagnosis.to_dict` (None where they are not finite)."""
    found = [row["verdict"] for row in rows]
    prompts = f"on {_all_of(found.count(TRUST), len(rows))}"
    if found.count(TRUST) == len(rows):
        return Verdict("good", "The samples can be used as they are.", f"{_off(rows)} {certified}".strip())
    if AVOID not in found:
        methods = " or ".join(sorted({row["correct"] for row in rows if row["verdict"] == CORRECT}))
        return Verdict(
            "correct",
            f"Use the samples with a correction (correct={methods}).",
            f"They can be used as they are {prompts}; with the correction on all. {_off(rows)}",
        )
    return Verdict(
        "bad",
        "Do not rely on the samples yet.",
        f"On {_all_of(found.count(AVOID), len(rows))} it could not be shown that they are near the posterior. "
        f"{_off(rows)} More updates, more samples or known good completions may change that.",
    )


def _in_training(run: RunRecord) -> str:
    if not run.after:
        return "No prompt has been looked at."
    was, now = (f"{100 * _mean(looks, 'ess'):.0f} %" if looks else "" for looks in (run.before, run.after))
    change = f"went from {was} to {now}" if was else f"is {now}"
    return f"The share of samples that count (ESS) {change}, by {run.after[0]['n']} fresh draws a prompt."


def _off(rows: list[Json]) -> str:
    exact = all(row.get("total_variation") is not None for row in rows)
    worst = max(1.0 if row["tv_high"] is None else row["tv_high"] for row in rows)
    if worst >= 1:
        return ""
    share = f"{100 * worst:.{1 if worst < 0.1 else 0}f} %"
    which = "" if len(rows) == 1 else " of the worst prompt"
    return f"{'Exactly' if exact else 'At most'} {share} of the probability{which} is in the wrong place."


def _certified(run: RunRecord) -> str:
    return (
        ""
        if run.certificate is None
        else f"A certificate states a gap of at most {run.certificate['mark']:g} nats."
    )


def _all_of(count: int, total: int) -> str:
    if total == 1:
        return "the prompt" if count else "no prompt"
    return f"all {total} prompts" if count == total else f"{count} of {total} prompts"


def _mean(looks: list[Json], name: str) -> float:
    return sum(look[name] or 0.0 for look in looks) / len(looks)
