"""The figures of a card: a line of its table for each row, and the hub's model index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

METRICS = (  # of the model index: figure of a row, its name, whether a larger value is worse
    ("tv_high", "total variation to the posterior, worst row, at most", True),
    ("gap", "min(KL(q||p), KL(p||q)) in nats, worst row, at most", True),
    ("ess", "effective sample size as a share, worst row", False),
)


def measured(report: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table of verdicts. report: infinite figures may be None, as in JSON."""
    is_exact = "total_variation" in report
    off, correct = report["tv_high"], report.get("correct")
    unknown = report["gap"] is None or math.isinf(report["gap"])
    return {
        "verdict": report["verdict"] + (f" ({correct})" if correct else ""),
        "off by": "?" if unknown and not is_exact else ("" if is_exact else "at most ") + percent(off),
        "KL(q‖p)": _interval(report, "kl_qp", "kl_qp"),
        "KL(p‖q)": _interval(report, "kl_pq", "kl_pq"),
        "log Z": _interval(report, "log_z", "exact_log_z"),
        "ESS": percent(report["ess"]),
    }


def _interval(report: Mapping[str, Any], name: str, exact: str) -> str:
    if "total_variation" in report:
        known = report[exact]
        return "∞" if known is None or math.isinf(known) else number(known)
    low, high = (number(report[f"{name}_{end}"]) for end in ("low", "high"))
    return "?" if low == high == "?" else f"{low} to {high}"


def percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def number(x: float | None) -> str:
    return "?" if x is None or not math.isfinite(x) else "0" if abs(x) < 1e-6 else f"{x:.3g}"


def row_count(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"


def results(reports: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The figures for the model index: those that every row has."""
    from huggingface_hub import EvalResult

    found = []
    for name, words, worst_is_high in METRICS:
        values = [report.get(name) for report in reports]
        known = [v for v in values if v is not None and math.isfinite(v)]
        if known and len(known) == len(values):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="rows",
                    dataset_name=row_count(len(values)),
                    metric_type=name,
                    metric_name=words,
                    metric_value=float(f"{(max if worst_is_high else min)(known):.4g}"),
                )
            )
    return found
