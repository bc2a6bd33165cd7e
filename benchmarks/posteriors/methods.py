"""The methods: what each draws one completion from, as exact laws at a range of test-time passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from amortlm import (
    GFNConfig,
    GFNTrainer,
    LanguageModel,
    Policy,
    Posterior,
    Target,
    default_lora,
    guided,
    narrow,
)
from amortlm.lab.experiment import Context, Settings, Trained
from amortlm.lab.training import Gold, train_gflownet, train_reinforced, train_supervised
from amortlm.lab.training import Problem as Posed
from amortlm.targets.base import Softened
from amortlm.types import Rollouts

from . import laws
from .cases import ROW, Case, Truth, policy_law, truth_of
from .laws import Array, Law
from .smc_law import average, between, smc_law

Point = dict[str, float]
RANK = 16
PENALTY = 15.0  # nats that violating a hard constraint costs in training, for every trained method
PASSES = [1, *(n for k in range(1, 17) for n in (2**k, 3 * 2 ** (k - 1))), 2**17]
PARTICLES = [2**k for k in range(1, 23)]
ENOUGH = 2**16  # particles; more where the distance is still above MARK
TOTAL = 2**21  # particles simulated for one point, in at least MIN_RUNS runs
MIN_RUNS = 8
MARK = 0.05  # total variation that counts as reached
CONVERGED = 1e-3  # a total variation at which a sampler has arrived


@dataclass(frozen=True)
class Problem:
    """A case made ready: its target, the truth, and the law of the prompted model."""

    case: Case
    lm: LanguageModel
    target: Target
    truth: Truth
    log_q: Array

    @classmethod
    def of(cls, case: Case, lm: LanguageModel) -> Problem:
        policy = Policy(lm, case.prompt, case.support(), default_lora(1))
        target = case.build(lm)
        return cls(case, lm, target, truth_of(target, policy), policy_law(policy))

    def posed(self, gold: Gold | None = None) -> Posed:
        """As the laboratory states it."""
        return Posed(self.case.build(self.lm), self.case.prompt, self.case.support(), [ROW], gold)

    def training_target(self, penalty: float = PENALTY) -> Target:
        return Softened(self.target, self.lm.log_prob("{z}", given=self.case.prompt), penalty)


def facts(problem: Problem) -> dict[str, float]:
    """What kind of target this is: size, how far the prompted model is, how many completions matter."""
    truth, q = problem.truth, np.exp(problem.log_q)
    positive = truth.p > 0
    w = laws.weights(problem.log_q, truth.log_r)
    return {
        "completions": len(q),
        "log_z": truth.log_z,
        "accepted": float(q[np.isfinite(truth.log_r)].sum()),
        "perplexity": float(np.exp(-(truth.p[positive] * np.log(truth.p[positive])).sum())),
        "ess": float((q @ w) ** 2 / (q @ w**2)),
        "floor_1000": laws.floor(truth.p, 1000),
    }


Train = Callable[[Context, Problem], Trained]

# One output at n passes


def point(law: Law, truth: Truth) -> Point:
    kl_qp, kl_pq = law.kl(truth.p)
    return {
        "passes": law.passes,
        "tv": law.total_variation(truth.p),
        "fail": law.fail,
        "kl_qp": kl_qp,
        "kl_pq": kl_pq,
        "modes": law.modes(truth.p),
    }


def plain(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    q = np.exp(log_q)
    return [point(Law(q / q.sum()), problem.truth)]


def sir(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    rng = np.random.default_rng([seed, 1])
    q, w = np.exp(log_q), laws.weights(log_q, problem.truth.log_r)
    return [point(laws.sir(q, w, n, rng), problem.truth) for n in PASSES]


def smc(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    """Simulated, so `tv` is an upper bound and `tv_low` a lower one; divergences of a simulated law mean nothing."""
    rng = np.random.default_rng([seed, 2])
    truth, out = problem.truth, []
    for n in PARTICLES:
        runs = max(TOTAL // n, MIN_RUNS) // 2
        settings = {"twisted": problem.target.every_prefix, "runs": runs}
        one, other = (smc_law(truth.space, np.exp(log_q), truth.log_r, n, rng, **settings) for _ in range(2))
        low, high = between(one, other, truth.p)
        found = point(average(one, other), truth)
        out.append({k: found[k] for k in ("passes", "fail", "modes")} | {"tv": high, "tv_low": low})
        if n >= ENOUGH and high < MARK:
            break
    return out


def chain(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    truth, out = problem.truth, []
    found = laws.metropolis_hastings(truth.space, np.exp(log_q), laws.weights(log_q, truth.log_r), PASSES)
    for law in found:
        out.append(point(law, truth))
        if out[-1]["tv"] < CONVERGED:
            break  # every step costs a pass over the support
    return out


def rejection(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    return [
        {**point(laws.rejection(np.exp(log_q), problem.truth.p, n), problem.truth), "limit": n}
        for n in PASSES
    ]


def best_of_n(problem: Problem, log_q: Array, seed: int) -> list[Point]:
    return [point(laws.best_of(np.exp(log_q), problem.truth.log_r, n), problem.truth) for n in PASSES]


# Training: each makes a policy of a problem, with the settings of the experiment

SETTINGS: Settings = {
    "model": "embedded",
    "updates": 100,
    "samples": 32,  # completions of an update
    "adapter": RANK,
    "hard_penalty": PENALTY,
    "sft": {"learning_rate": 1e-3},
    "ppo": {"learning_rate": 1e-3, "minibatches": 2, "beta": 1.0},
    "grpo": {"learning_rate": 1e-3, "beta": 0.04},
    "gflownet": {"learning_rate": 1e-3},
    "subtb": {},
    "db": {},
    "prefix_tb": {},
    "vargrad": {},
    "huber": {"objective": {"vargrad": {"huber": 3.0}}},
    "alpha": {},
    # An estimate of log Z from replayed or tempered samples is biased.
    "tb": {"objective": {"tb": {"log_z": "learned"}}},
    "forward_kl": {"behaviour": {"policy": 1.0}},  # its weights are right for draws of q alone
}
OBJECTIVES = ("subtb", "db", "tb", "prefix_tb", "vargrad", "huber", "alpha", "forward_kl")
QUIET = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "diagnose_steps": 0}


def trainer_of(lm: LanguageModel, case: Case, folder: str, **settings: Any) -> GFNTrainer:
    """A trainer that keeps to itself. settings: "kind" (a subclass), "callbacks", and fields of GFNConfig."""
    kind, callbacks = settings.pop("kind", GFNTrainer), settings.pop("callbacks", None)
    return kind(
        lm,
        target=case.build(lm),
        prompt=case.prompt,
        support=case.support(),
        train_dataset=[ROW],
        args=GFNConfig(
            **{
                **QUIET,
                "diagnose_steps": 0,
                **settings,
                "output_dir": folder,
                "per_device_train_batch_size": 1,
            }
        ),
        adapter=RANK,
        callbacks=callbacks,
    )


def gflownet(context: Context, problem: Problem, objective: str) -> Trained:
    settings = context.settings
    config = {
        **QUIET,
        "objective": objective,
        "max_steps": settings["updates"],
        "num_samples": settings["samples"],
        "per_device_train_batch_size": 1,
        "buffer_size": 2 * settings["samples"],
        "hard_penalty": settings["hard_penalty"],
        **settings["gflownet"],
        **settings[objective],
    }
    return train_gflownet(context, problem.posed(), config)


def guided_model(context: Context, problem: Problem) -> Trained:
    """The prompted model, looking ahead to what the target's constraints ask for. Nothing is trained."""
    support, _ = narrow(problem.case.support(), problem.target, problem.lm)
    policy = guided(Policy(problem.lm, problem.case.prompt, support, default_lora(1)), [ROW], context.seed)
    return Trained(Posterior(policy, problem.target))


def sft(context: Context, problem: Problem) -> Trained:
    """On exact draws of the posterior, which only an oracle has: as many as the others draw completions."""
    settings, truth = context.settings, problem.truth
    draws = settings["updates"] * settings["samples"]
    index = np.random.default_rng([context.seed, 3]).choice(len(truth.p), draws, p=truth.p / truth.p.sum())
    posed = problem.posed(gold=[[truth.completions[i] for i in index.tolist()]])
    config = {"max_steps": settings["updates"], "batch_size": settings["samples"], **settings["sft"]}
    return replace(train_supervised(context, posed, config), reward_evaluations=draws)


def reward_of(problem: Problem, penalty: float = PENALTY) -> Callable[[Rollouts], Tensor]:
    """log R - log q_0 in the place of a reward: with a KL penalty of weight 1 its optimum is the posterior itself."""
    reference = Policy(problem.lm, problem.case.prompt, problem.case.support(), default_lora(1))
    target = problem.training_target(penalty)

    def reward(rollouts: Rollouts) -> Tensor:
        log_q = reference.evaluate(rollouts).final(rollouts.lengths)
        return target.score_final(rollouts) - log_q.detach()

    return reward


def reinforced(context: Context, problem: Problem, method: str) -> Trained:
    """PPO: its optimum is the posterior. GRPO: as it is used, with advantages divided by their spread and a small KL
    penalty; its optimum is not."""
    settings, penalty = context.settings, context.settings["hard_penalty"]
    reward = reward_of(problem, penalty) if method == "ppo" else problem.training_target(penalty).score_final
    sizes = {"max_steps": settings["updates"], "num_samples": settings["samples"]}
    config = {**sizes, **settings[method]}
    return train_reinforced(context, problem.posed(), method, config, reward=reward)


CURVES: dict[str, Callable[[Problem, Array, int], list[Point]]] = {
    "q": plain,
    "rejection": rejection,
    "best-of-n": best_of_n,
    "sir": sir,
    "mh": chain,
    "smc": smc,
}
MAIN = "gflownet-vargrad"  # judges finished text, too; the one that the claims are about
UNTRAINED = {"prompted": "q"} | {
    name: name for name in ("rejection", "best-of-n", "sir", "mh", "smc")
}  # their curves
TRAINED: dict[str, tuple[Train, tuple[str, ...]]] = {  # and the guided model, with what corrects them
    "guided": (guided_model, ("sir", "mh")),
    "sft": (sft, ("sir",)),
    **{name: (partial(reinforced, method=name), ("sir",)) for name in ("ppo", "grpo")},
    "forward-kl": (partial(gflownet, objective="forward_kl"), ("sir",)),
    **{
        f"gflownet-{name}": (partial(gflownet, objective=name), ("sir",))
        for name in ("subtb", "db", "tb", "prefix_tb", "huber", "alpha")
    },
    MAIN: (partial(gflownet, objective="vargrad"), ("sir", "smc", "mh")),
}
METHODS = [*UNTRAINED, *TRAINED]
EVERY_PREFIX = (
    "gflownet-subtb",
    "gflownet-db",
    "gflownet-prefix_tb",
)  # cannot train on a target that judges finished text only
