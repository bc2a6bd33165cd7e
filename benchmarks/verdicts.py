"""How often does the diagnosis call a wrong sampler right? Seeded runs of `amortlm.diagnostics.diagnose` itself where
nothing can be enumerated and there are no gold completions: `python -m benchmarks.coverage --verdicts`.

The targets of `benchmarks/posteriors`. The sampler is the posterior itself, but for one mode, the completions that hold
one word, whose probability it has scaled by a factor: its own weights look perfect. Laws are tables (`tabulated`).
A verdict is false if it says "trust it" or "use with correction", and the samples, corrected as it says, are further
from the posterior than CORRECTED_TV in total variation. A certificate at any mark (`stop_at_gap`) is false only if the
gap that is reported is below the true one.

A mode is in reach if the frozen model writes what it consists of with a probability of at least REACH. --blind: the
frozen model has lost the mode by the same factor, so that it is out of everybody's reach; such samplers cannot be told
from right ones.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta  # type: ignore[import-untyped]
from tabulate import tabulate

from amortlm import LanguageModel
from amortlm.diagnostics.diagnose import CORRECT, CORRECTED_TV, TRUST, UNDECIDED, RowDiagnosis, diagnose

from .posteriors.cases import CASES, ROW, Truth
from .posteriors.laws import Array, Law, log_weights, metropolis_hastings, sir
from .posteriors.methods import Problem
from .tabulated import TablePolicy, TableTarget

FACTORS = (0.0, 1e-6, 1e-3, 1.0)  # 1: the control, a sampler that is right
Mask = NDArray[np.bool_]
CERTIFIED = (TRUST, CORRECT)
SHARE = 0.4  # of the posterior that the lost mode should hold; the word that comes nearest is taken
REACH = 0.005


@dataclass(frozen=True)
class Lost:
    """A sampler that has scaled a mode by a factor: laws over the completions of a problem."""

    problem: Problem
    mode: Mask  # [M]
    factor: float
    blind: bool

    @property
    def p(self) -> Array:
        return self.problem.truth.p / self.problem.truth.p.sum()

    @property
    def q(self) -> Array:
        return scaled(self.p, self.mode, self.factor)

    @property
    def prior(self) -> Array:
        found = np.exp(self.problem.log_q)
        return scaled(found, self.mode, self.factor if self.blind else 1.0)

    @property
    def reach(self) -> float:
        """p(mode)^2 / sum of p^2 / prior over the mode: the prior's mass there, were it spread as the posterior's."""
        seen = self.mode & (self.p > 0)
        p, prior = self.p[seen], np.maximum(self.prior[seen], 1e-300)
        return float(p.sum() ** 2 / (p**2 / prior).sum())

    def runs(self, args: argparse.Namespace) -> list[RowDiagnosis]:
        """The first args.chained of them may run chains."""
        truth = self.problem.truth
        policy = TablePolicy(truth.space, self.q, self.prior)
        target = TableTarget(truth.space, truth.log_r, not self.problem.case.finished_only)
        options = {"limit": 0, "level": args.level}
        return [
            diagnose(policy, target, [ROW], args.n, seed=k, chains=k < args.chained, **options).rows[0]
            for k in range(args.runs)
        ]

    def distance(self, correct: str | None, n: int) -> float:
        """Total variation of samples as they are, or corrected: from a pool of n draws ("sir"), by chains of 16 states
        ("mh"; the budget of `Posterior.sample` for each sample)."""
        with np.errstate(divide="ignore"):
            w = np.exp(log_weights(np.log(np.maximum(self.q, 1e-87)), np.log(self.p)))
        law = Law(self.q)
        if correct == "sir":
            law = sir(self.q, w, n, np.random.default_rng(0))
        if correct == "mh":
            law = next(iter(metropolis_hastings(self.problem.truth.space, self.q, w, [16])))
        return law.total_variation(self.p)

    @property
    def gap(self) -> float:
        return min(Law(self.q).kl(self.p))


def scaled(law: Array, mode: Mask, factor: float) -> Array:
    out = np.where(mode, factor * law, law)
    return out / out.sum()


def mode_of(truth: Truth) -> Mask:
    """[M] the completions that hold the word by which the posterior is best cut into SHARE and the rest."""
    strings = truth.space.strings[truth.space.first :]
    holds = np.stack([(strings == word).any(1) for word in range(truth.space.width)])
    return holds[int(np.abs(holds @ truth.p - SHARE).argmin())]


def certified(found: RowDiagnosis, distances: dict[str | None, float]) -> bool:
    """Does the verdict promise what the samples do not hold?"""
    return found.verdict.startswith(CERTIFIED) and distances[found.correct] > CORRECTED_TV


def at_most(hits: int, runs: int, level: float = 0.99) -> float:
    """The upper end of the Clopper-Pearson bound for a rate."""
    return 1.0 if hits == runs else float(beta.ppf(level, hits + 1, runs - hits))


def counted(lost: Lost, args: argparse.Namespace) -> tuple[list[object], dict[str, tuple[int, int]]]:
    """A line of the table, and (false, runs) by kind."""
    found = lost.runs(args)
    says = {row.correct for row in found if row.verdict.startswith(CERTIFIED)}
    distances = {correct: lost.distance(correct, args.n) for correct in says}
    decided = [row for row in found if row.verdict != UNDECIDED]
    chains = [row for row in found[: args.chained] if row.truth.source.startswith("mcmc")]
    by_weights = [row for row in found if not row.truth.source.startswith("mcmc")]
    low = [row for row in decided if row.gap < lost.gap - 1e-6]
    hits = {
        "verdict by weights": (sum(certified(row, distances) for row in by_weights), len(found)),
        "verdict by chains": (sum(certified(row, distances) for row in chains), len(chains)),
        "gap": (len(low), len(decided)),
    }
    said = Counter(f"{row.verdict} ({row.correct})" if row.correct else row.verdict for row in found)
    line = [lost.problem.case.name, lost.factor, float(lost.p[lost.mode].sum()), lost.reach]
    return [*line, *(f"{a}/{b}" for a, b in hits.values()), dict(said)], hits


def measure(lm: LanguageModel, args: argparse.Namespace) -> None:
    table, totals = [], Counter[tuple[bool, str, str]]()
    for case in CASES:
        if args.verdicts and case.name not in args.verdicts:
            continue
        problem = Problem.of(case, lm)
        for factor in FACTORS:
            lost = Lost(problem, mode_of(problem.truth), factor, args.blind)
            line, hits = counted(lost, args)
            table.append(line)
            print(line, flush=True)
            for name, (false, runs) in hits.items() if factor < 1 else ():
                totals[lost.reach >= REACH, name, "false"] += false
                totals[lost.reach >= REACH, name, "runs"] += runs
    headers = ["target", "factor", "mode", "reach", "by weights", "by chains", "gap too low", "verdicts"]
    print(tabulate(table, headers, "github", floatfmt=".3g"))
    for near, name in sorted({key[:2] for key in totals}, reverse=True):
        false, runs = totals[near, name, "false"], totals[near, name, "runs"]
        if runs:
            where = "in" if near else "out of"
            print(f"modes {where} reach, false {name}: {false} of {runs}, at most {at_most(false, runs):.2%}")
