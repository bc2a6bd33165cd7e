"""How far a sampler is from its posterior: figures, intervals and a verdict for each row.

Where the support can be enumerated the distances are exact. Elsewhere `gap` is an upper bound at a level: the smaller
of the upper ends of KL(q || p) and KL(p || q). Either bounds the total variation (Pinsker; Bretagnolle and Huber
where KL is large), and KL(q || p) is infinite as soon as q writes anything with R = 0, KL(p || q) is not.

Verdicts:

- "trust it": the samples may be used as they are. Exact TV at most TRUST_TV, or gap at most TRUST_KL.
- "use with correction": not as they are, but reweighted or rejected they give the posterior, and that was seen to
  work here: by importance weights ("sir"), which need about exp(KL(p || q)) samples (Chatterjee and Diaconis 2018),
  so EFFECTIVE times that must fit into n, and the effective sample size be EFFECTIVE too (and k-hat below 0.7 where
  the truth itself came from weights); or by Metropolis-Hastings ("mh"), whose chains from different starts agreed.
- "do not use": neither, or nothing could show it. More samples, gold completions or training may change that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from amortlm.diagnostics.bounds import Bounds, bounds
from amortlm.diagnostics.diversity import diversity
from amortlm.errors import DataError
from amortlm.inference.exact import LIMIT
from amortlm.inference.truth import Truth, posterior_draws
from amortlm.types import Row

if TYPE_CHECKING:
    from amortlm.posterior import Posterior

LEVEL = 0.99
TRUST_TV = 0.1  # exact: no event is more than 10 points off
TRUST_KL = 0.1  # an upper end, in nats: TV at most 0.22 in the worst case, commonly a third of that
EFFECTIVE = 10  # samples that reweighting must leave of n: fewer estimate nothing to better than a third

TRUST, CORRECT, AVOID = "trust it", "use with correction", "do not use"
Gold = Sequence[Sequence[str | Sequence[int]]]


class Diagnosis:
    """One report (a dict of figures) per row; prints as a table of the few that a person decides by.

    What a report holds: docs/diagnostics.md. Nats; None and infinite ends where nothing is known.
    """

    def __init__(self, reports: list[dict[str, Any]]):
        self.reports = reports

    def mean(self, name: str) -> float:
        return sum(r[name] for r in self.reports) / len(self.reports)

    def __str__(self) -> str:
        from tabulate import tabulate

        table = tabulate(
            [_line(i, r) for i, r in enumerate(self.reports)], headers="keys", disable_numparse=True
        )
        return f"{table}\n\n{_legend(self.reports)}"


def diagnose(
    posterior: Posterior,
    rows: Sequence[Row],
    n: int = 256,
    *,
    seed: object = 0,
    limit: int = LIMIT,
    level: float = LEVEL,
    gold: Gold | None = None,
) -> Diagnosis:
    """The reports of `rows`; see `Posterior.diagnose`."""
    if gold is not None and len(gold) != len(rows):
        raise DataError(f"{len(gold)} lists of gold completions for {len(rows)} rows; give one list per row")
    known: Gold = gold if gold is not None else [[]] * len(rows)
    return Diagnosis(
        [_report(posterior, row, n, seed, limit, level, g) for row, g in zip(rows, known, strict=True)]
    )


def _report(
    posterior: Posterior,
    row: Row,
    n: int,
    seed: object,
    limit: int,
    level: float,
    gold: Sequence[str | Sequence[int]],
) -> dict[str, Any]:
    rollouts, log_w, weighed = posterior._weigh(row, n, seed)
    assert posterior.target is not None
    truth = posterior_draws(posterior.policy, posterior.target, row, n, seed=seed, limit=limit, gold=gold)
    report: dict[str, Any] = weighed.to_dict() | diversity(rollouts.completions())
    report |= _intervals(bounds(log_w, truth.log_w if truth.trusted else None, level), truth.margin)
    report |= {"level": level, "truth": truth.label, "truth_draws": len(truth.log_w) if truth.trusted else 0}
    report |= {"rhat": truth.rhat, "pool_khat": truth.khat, "pool_ess": truth.ess}
    if truth.exact is not None and (d := truth.distance) is not None:
        report["exact_log_z"] = truth.exact.log_z
        report |= {"total_variation": d.total_variation, "kl_qp": d.kl_qp, "kl_pq": d.kl_pq}
    report["gap"] = gap(report)
    report["tv_high"] = total_variation_bound(report)
    return report | judge(report, truth)


def _intervals(found: Bounds, margin: float) -> dict[str, float]:
    """The ends, moved out by what the law of the truth's draws may be off."""
    return {
        "log_z_low": found.log_z.lower,
        "log_z_high": found.log_z.upper + margin,
        "kl_qp_low": found.kl_qp.lower,
        "kl_qp_high": found.kl_qp.upper + margin,
        "kl_pq_low": max(0.0, found.kl_pq.lower - margin),
        "kl_pq_high": found.kl_pq.upper + margin,
    }


def gap(report: dict[str, Any]) -> float:
    """Nats: the smaller KL divergence, exact where known, else the smaller upper end."""
    if "kl_qp" in report:
        return min(report["kl_qp"], report["kl_pq"])
    return min(report["kl_qp_high"], report["kl_pq_high"])


def total_variation_bound(report: dict[str, Any]) -> float:
    """Total variation where exact, else what the gap lets it be at most."""
    if "total_variation" in report:
        return report["total_variation"]
    kl = report["gap"]
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl)))


def judge(report: dict[str, Any], truth: Truth) -> dict[str, str | None]:
    """{"verdict", "correct"}: the rule of the module docstring. correct: "sir" or "mh", None where nothing helps."""
    exact = truth.exact is not None
    trusted = report["tv_high"] <= TRUST_TV if exact else report["gap"] <= TRUST_KL
    if trusted:
        return {"verdict": TRUST, "correct": None}
    kl_pq = report["kl_pq"] if exact else report["kl_pq_high"]
    if truth.trusted and truth.source == "mcmc":
        return {"verdict": CORRECT, "correct": "mh"}
    n = report["n"]
    if truth.trusted and EFFECTIVE * math.exp(min(kl_pq, 700)) <= n and n * report["ess"] >= EFFECTIVE:
        return {"verdict": CORRECT, "correct": "sir"}
    return {"verdict": AVOID, "correct": None}


def _line(i: int, r: dict[str, Any]) -> dict[str, Any]:
    advice = f" ({r['correct']})" if r["correct"] else ""
    return {
        "row": i,
        "verdict": r["verdict"] + advice,
        "off by": _off(r),
        "KL(q||p)": _figure(r, "kl_qp", "kl_qp"),
        "KL(p||q)": _figure(r, "kl_pq", "kl_pq"),
        "log Z": _figure(r, "exact_log_z", "log_z"),
        "ESS": _percent(r["ess"]),
        "k-hat": "-" if math.isnan(r["khat"]) else f"{r['khat']:.2f}",
        "truth": r["truth"],
    }


def _off(r: dict[str, Any]) -> str:
    if math.isinf(r["gap"]) and "total_variation" not in r:
        return "?"
    percent = _percent(r["tv_high"])
    return percent if "total_variation" in r else f"<= {percent}"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _figure(r: dict[str, Any], exact: str, name: str) -> str:
    if exact in r:
        return _number(r[exact])
    low, high = r[f"{name}_low"], r[f"{name}_high"]
    if math.isinf(low) and math.isinf(high) and low != high:
        return "?"
    return f"{_number(low)} .. {_number(high) if math.isfinite(high) else '?'}"


def _number(x: float) -> str:
    if abs(x) < 1e-6:
        return "0"  # rounding
    return f"{x:.3g}" if abs(x) < 10 or math.isinf(x) else f"{x:.2f}"


def _legend(reports: Sequence[dict[str, Any]]) -> str:
    level, n = reports[0]["level"], reports[0]["n"]
    lines = [
        "off by: total variation, the share of the probability in the wrong place. KL, log Z: in nats, exact or",
        f"an interval at level {level:g} ('?': not known). KL(q||p) grows with what q makes up, KL(p||q) with what",
        f"it misses. ESS: effective share of {n} samples. k-hat: importance weights hold below 0.7. truth: the draws",
        "of the posterior that q was held against. (sir), (mh): what to give posterior.sample(correct=...).",
    ]
    if any("exact_log_z" not in r for r in reports):
        lines.append(
            "Truth from sir and mcmc starts from q: a mode that q never visits stays unseen without gold."
        )
    return "\n".join(lines)
