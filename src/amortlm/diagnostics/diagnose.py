"""How far a sampler is from its posterior: figures, intervals and a verdict for each row.

Decisions use `gap`, the smaller of KL(q || p) and KL(p || q): exact if the support can be enumerated, else the smaller
of the upper ends of their intervals. The gap bounds the total variation (by Pinsker; by Bretagnolle and Huber if KL is
large). The smaller of the two is used because one is often useless: KL(q || p) is infinite if q writes any completion
with R = 0, while KL(p || q) can still be finite.

Verdicts:

- "trust it": the samples may be used as they are. The exact total variation is at most TRUST_TV; or, if it is unknown,
  the gap is at most TRUST_KL.
- "use with correction": the samples may be used after a correction. Either by importance weights ("sir"): a draw that
  is resampled from n draws of q has a total variation from the posterior of at most CORRECTED_TV, by its upper bound
  (`amortlm.diagnostics.bounds.resampled_tv`), and the effective sample size is at least EFFECTIVE. Or by
  Metropolis-Hastings ("mh"): chains from different starts agreed.
- "do not use": no rule above was shown to hold. More samples, gold completions or training may change that.
- "not decided": Markov chains would have decided, and were left out (chains=False). The other verdicts are the same
  with and without chains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amortlm.diagnostics.bounds import Bounds, Interval, bounds, resampled_tv
from amortlm.diagnostics.diversity import Diversity, diversity
from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.errors import DataError, nearest
from amortlm.inference.correct import weigh
from amortlm.inference.exact import LIMIT, Distance
from amortlm.inference.truth import LEFT_OUT, posterior_draws
from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.types import Row

LEVEL = 0.99
TRUST_TV = 0.1  # exact total variation: the probability of any event is off by at most 10 percentage points
TRUST_KL = 0.1  # upper end of a KL, nats: the total variation is at most 0.22, and commonly a third of that
CORRECTED_TV = math.sqrt(TRUST_KL / 2)  # of corrected draws: as much as TRUST_KL allows
EFFECTIVE = 10  # least effective sample size after reweighting: below it, estimates have errors above a third

TRUST, CORRECT, AVOID = "trust it", "use with correction", "do not use"
UNDECIDED = "not decided"
Completions = Sequence[str | Sequence[int]]
Gold = Sequence[Completions]  # for each row


@dataclass(frozen=True)
class Evidence:
    """The draws of the posterior from which the upper ends are computed (`amortlm.inference.truth`), and the figures
    that tell whether they can be trusted.

    source     "enumeration", "sir" or "mcmc"; or "mcmc (not converged)", "none": no draws could be trusted; or "chains
               left out"
    draws      number of draws used; 0 if none could be trusted
    rhat       R-hat of the chains; NaN for other sources
    pool_khat  k-hat of the weights of the pool of draws of q; NaN for enumeration
    pool_ess   effective sample size of these weights, as a share; NaN for enumeration
    """

    source: str
    draws: int
    rhat: float
    pool_khat: float
    pool_ess: float


@dataclass(frozen=True)
class RowDiagnosis:
    """The diagnosis of the sampler on one row. Prints as a table of the main figures.

    importance   figures of n draws of q alone: ESS, k-hat, ELBO, log Z, ...
    diversity    of these n completions
    bounds       intervals for log Z, KL(q || p) and KL(p || q) that hold jointly at bounds.level; nats
    truth        the draws of the posterior from which the upper ends are computed
    sir_tv_high  total variation of draws resampled from n draws of q is at most this, at bounds.level
    exact_log_z  log Z by enumeration, nats; None if the support is too large
    distance     total variation and both KL divergences by enumeration; None if the support is too large
    """

    importance: ImportanceEstimate
    diversity: Diversity
    bounds: Bounds
    truth: Evidence
    sir_tv_high: float = 1.0
    exact_log_z: float | None = None
    distance: Distance | None = None

    @property
    def gap(self) -> float:
        """Nats: the smaller KL divergence, exact where known, else the smaller upper end."""
        if self.distance is not None:
            return min(self.distance.kl_qp, self.distance.kl_pq)
        return min(self.bounds.kl_qp.upper, self.bounds.kl_pq.upper)

    @property
    def gap_low(self) -> float:
        """Nats: the gap is at least this."""
        if self.distance is not None:
            return self.gap
        return min(self.bounds.kl_qp.lower, self.bounds.kl_pq.lower)

    @property
    def tv_high(self) -> float:
        """Total variation, in [0, 1]: exact where known, else the most that the gap allows."""
        if self.distance is not None:
            return self.distance.total_variation
        return min(math.sqrt(self.gap / 2), math.sqrt(-math.expm1(-self.gap)))

    @property
    def verdict(self) -> str:
        """TRUST, CORRECT, AVOID or UNDECIDED, by the rules of the module docstring."""
        if (self.tv_high <= TRUST_TV) if self.distance is not None else (self.gap <= TRUST_KL):
            return TRUST
        if self._correction() is not None:
            return CORRECT
        return UNDECIDED if self.truth.source == LEFT_OUT else AVOID

    @property
    def correct(self) -> str | None:
        """The correction to use if the verdict is CORRECT, "sir" or "mh"; None for the other verdicts."""
        return self._correction() if self.verdict == CORRECT else None

    def _correction(self) -> str | None:
        if self.truth.source == "mcmc":
            return "mh"
        effective = self.importance.n * self.importance.ess
        return "sir" if self.sir_tv_high <= CORRECTED_TV and effective >= EFFECTIVE else None

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, as in certificates and in the file of `amortlm evaluate --output`
        (docs/diagnostics.md)."""
        figures: dict[str, Any] = {**self.importance.to_dict(), **asdict(self.diversity)}
        for name in ("log_z", "kl_qp", "kl_pq"):
            interval: Interval = getattr(self.bounds, name)
            figures |= {f"{name}_low": interval.lower, f"{name}_high": interval.upper}
        figures |= {"level": self.bounds.level, "truth": self.truth.source, "truth_draws": self.truth.draws}
        figures |= {name: getattr(self.truth, name) for name in ("rhat", "pool_khat", "pool_ess")}
        figures["sir_tv_high"] = self.sir_tv_high
        if self.distance is not None:
            figures["exact_log_z"] = self.exact_log_z
            figures |= {name: getattr(self.distance, name) for name in ("total_variation", "kl_qp", "kl_pq")}
        return figures | {name: getattr(self, name) for name in ("gap", "tv_high", "verdict", "correct")}

    def __str__(self) -> str:
        return str(Diagnosis([self]))


@dataclass(frozen=True)
class Diagnosis:
    """The diagnoses of several rows; prints as a table with a line for each."""

    rows: list[RowDiagnosis]

    def mean(self, name: str) -> float:
        """The mean over rows of a figure, by its name in `RowDiagnosis.to_dict`. Raises DataError if a row has no such
        figure (exact figures exist only if the support was enumerated)."""
        figures = [row.to_dict() for row in self.rows]
        if not all(name in f for f in figures):
            raise DataError(f"not every row has the figure {name!r}; {nearest(name, figures[0])}")
        return sum(f[name] for f in figures) / len(figures)

    def __str__(self) -> str:
        from tabulate import tabulate

        lines = [_line(i, row) for i, row in enumerate(self.rows)]
        return f"{tabulate(lines, headers='keys', disable_numparse=True)}\n\n{_legend(self.rows)}"


def diagnose(
    policy: Policy,
    target: Target,
    rows: Sequence[Row],
    n: int,
    *,
    seed: object = 0,
    limit: int = LIMIT,
    level: float = LEVEL,
    gold: Gold | None = None,
    chains: bool = True,
) -> Diagnosis:
    """The diagnosis of `rows`; see `Posterior.diagnose`."""
    if gold is not None and len(gold) != len(rows):
        raise DataError(f"{len(gold)} lists of gold completions for {len(rows)} rows; give one list per row")
    known = gold if gold is not None else [[]] * len(rows)
    return Diagnosis(
        [
            diagnose_row(
                policy, target, row, n, seed=seed, limit=limit, level=level, gold=good, chains=chains
            )
            for row, good in zip(rows, known, strict=True)
        ]
    )


def diagnose_row(
    policy: Policy,
    target: Target,
    row: Row,
    n: int,
    *,
    seed: object = 0,
    limit: int = LIMIT,
    level: float = LEVEL,
    gold: Completions = (),
    chains: bool = True,
) -> RowDiagnosis:
    """The diagnosis of one row. gold: completions of the row that are known to be good; chains: may they run?"""
    pool = weigh(policy, target, row, n, seed=seed)
    truth = posterior_draws(policy, target, row, n, seed=seed, limit=limit, gold=gold, chains=chains)
    log_w_true = truth.log_w if truth.trusted else None
    draws = len(truth.log_w) if truth.trusted else 0
    return RowDiagnosis(
        importance=estimate(pool.log_weights, pool.log_reward),
        diversity=diversity(pool.rollouts.completions()),
        bounds=bounds(pool.log_weights, log_w_true, level, truth.margin),
        sir_tv_high=1.0
        if log_w_true is None
        else resampled_tv(pool.log_weights, log_w_true, level, truth.margin),
        truth=Evidence(truth.label, draws, truth.rhat, truth.khat, truth.ess),
        exact_log_z=None if truth.exact is None else truth.exact.log_z,
        distance=truth.distance,
    )


def _line(i: int, row: RowDiagnosis) -> dict[str, Any]:
    d, e = row.distance, row.importance
    return {
        "row": i,
        "verdict": row.verdict + (f" ({row.correct})" if row.correct else ""),
        "off by": _off(row),
        "KL(q||p)": _figure(None if d is None else d.kl_qp, row.bounds.kl_qp),
        "KL(p||q)": _figure(None if d is None else d.kl_pq, row.bounds.kl_pq),
        "log Z": _figure(row.exact_log_z, row.bounds.log_z),
        "ESS": _percent(e.ess),
        "k-hat": "-" if math.isnan(e.khat) else f"{e.khat:.2f}",
        "truth": row.truth.source,
    }


def _off(row: RowDiagnosis) -> str:
    if row.distance is not None:
        return _percent(row.tv_high)
    return "?" if math.isinf(row.gap) else f"<= {_percent(row.tv_high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _figure(exact: float | None, interval: Interval) -> str:
    if exact is not None:
        return _number(exact)
    low, high = interval.lower, interval.upper
    if math.isinf(low) and math.isinf(high) and low != high:
        return "?"
    return f"{_number(low)} .. {_number(high) if math.isfinite(high) else '?'}"


def _number(x: float) -> str:
    if abs(x) < 1e-6:
        return "0"  # rounding
    return f"{x:.3g}" if abs(x) < 10 or math.isinf(x) else f"{x:.2f}"


def _legend(rows: Sequence[RowDiagnosis]) -> str:
    level, n = rows[0].bounds.level, rows[0].importance.n
    lines = [
        "off by: total variation, the share of the probability in the wrong place. KL, log Z: in nats, exact or an",
        f"interval at level {level:g} ('?': unknown). KL(q||p) grows with probability of q where p has little,",
        f"KL(p||q) with probability of p that q misses. ESS: effective share of {n} samples. k-hat: importance weights",
        "can be trusted below 0.7. truth: source of the draws of the posterior p. (sir), (mh): the value for correct=",
        "of posterior.sample, or for --correct of amortlm sample.",
    ]
    if any(row.distance is None for row in rows):
        lines.append(
            "Truth from sir and mcmc starts from q and the frozen model: it cannot show a mode that neither visits,"
        )
        lines.append("unless a gold completion lies in that mode.")
    if any(row.verdict == AVOID for row in rows):
        lines.append(
            f"{AVOID}: not even corrected samples were shown to be right. Train for longer (max_steps), draw more"
        )
        lines.append("(n, or -n of amortlm evaluate), or give completions that are known to be good (gold).")
    if any(row.verdict == UNDECIDED for row in rows):
        lines.append(
            f"{UNDECIDED}: weights do not suffice for a verdict. Markov chains may, and were left out: diagnose with"
        )
        lines.append("chains=True, or by amortlm evaluate without --quick.")
    return "\n".join(lines)
