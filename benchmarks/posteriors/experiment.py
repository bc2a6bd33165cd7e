"""The benchmark as an experiment: a target and a method together are what it calls a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from amortlm import GFNConfig, LanguageModel
from amortlm.lab.baselines.ppo import PPOConfig
from amortlm.lab.experiment import Context, Experiment, Method, Metric, Outcome, Settings, Trained

from . import methods as m
from .cases import CASES, Case, policy_law
from .digest import digest
from .figures import figures
from .laws import Array
from .report import QUESTION, readme

Problems = Callable[[Case], m.Problem]


@dataclass(frozen=True)
class Sampler:
    """log_q [M]: the law of one draw; curves: what is made of such draws; seconds of training, None: not trained."""

    problem: m.Problem
    log_q: Array
    curves: Sequence[str]
    seconds: float | None = None


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Problems:
    """A target is enumerated when its first method runs."""
    made: dict[str, m.Problem] = {}

    def problem_of(case: Case) -> m.Problem:
        if case.name not in made:
            made[case.name] = m.Problem.of(case, lm)
        return made[case.name]

    return problem_of


def method(context: Context, case: Case, name: str) -> Trained:
    problem = context.data(case)
    if name in m.UNTRAINED:
        return Trained(Sampler(problem, problem.log_q, [m.UNTRAINED[name]]))
    train, corrections = m.TRAINED[name]
    start = time.perf_counter()
    trained = train(context, problem)
    seconds = time.perf_counter() - start
    law = policy_law(trained.sampler.policy)
    return Trained(Sampler(problem, law, ["q", *corrections], seconds), trained.reward_evaluations)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Total variation at most passes; records: every curve."""
    sampler: Sampler = trained.sampler
    problem = sampler.problem
    curves = {name: m.CURVES[name](problem, sampler.log_q, context.seed) for name in sampler.curves}
    details = {"training_seconds": sampler.seconds or 0.0}
    if sampler.seconds is not None:
        details["accepted"] = float(np.exp(sampler.log_q)[np.isfinite(problem.truth.log_r)].sum())
    best = min(curve[-1]["tv"] for curve in curves.values())
    return Outcome({"tv": best}, details, {"curves": curves, "facts": m.facts(problem)})


def methods_of(cases: Sequence[Case]) -> dict[str, Method]:
    return {
        f"{case.name} {name}": partial(method, case=case, name=name)
        for case in cases
        for name in m.METHODS
        if not (case.finished_only and name in m.EVERY_PREFIX)
    }


EXPERIMENT = Experiment(
    name="posteriors",
    question=QUESTION,
    presets={"small": m.SETTINGS},
    groups={"ppo": PPOConfig, **dict.fromkeys(("gflownet", *m.OBJECTIVES), GFNConfig)},
    prepare=prepare,
    methods=methods_of(CASES),
    once=frozenset(f"{case.name} {name}" for case in CASES for name in m.UNTRAINED),
    evaluate=evaluate,
    metrics={"tv": Metric("TV at most passes", ".3f", "lower")},
    digest=digest,
    figures=figures,
    readme=readme,
)
