"""The methods: what each draws one completion from, as exact laws at a range of test-time passes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import set_seed

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Target, default_lora
from amortlm.lab.baselines.finetune import BoundedReward
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

    def policy(self, seed: int) -> Policy:
        set_seed(seed)  # an adapter starts at random
        return Policy(self.lm, self.case.prompt, self.case.support(), default_lora(RANK))

    def training_target(self) -> Target:
        return Softened(self.target, self.lm.log_prob("{z}", given=self.case.prompt), PENALTY)


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


@dataclass(frozen=True)
class Budget:
    """Training: `updates` of `samples` completions each, all judged once."""

    updates: int
    samples: int

    @property
    def passes(self) -> int:
        return self.updates * self.samples


Train = Callable[[Problem, Budget, int], Policy]
Run = Callable[[Problem, Budget, int], dict[str, Any]]  # JSON of one (target, method, seed)


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


# Training

LEARNING_RATE = {"ppo": 1e-3, "grpo": 1e-3, "sft": 1e-3, "forward_kl": 1e-3}
GFLOWNET_RATE = 1e-3
SETTINGS: dict[str, dict[str, Any]] = {
    # An estimate of log Z from replayed or tempered samples is biased.
    "tb": {"objective": {"tb": {"log_z": "learned"}}},
    "forward_kl": {"behaviour": {"policy": 1.0}},  # its weights are right for draws of q alone
}


def trainer_of(lm: LanguageModel, case: Case, folder: str, **settings: Any) -> GFNTrainer:
    """A trainer that keeps to itself. settings: "kind" (a subclass), "callbacks", and fields of GFNConfig."""
    kind, callbacks = settings.pop("kind", GFNTrainer), settings.pop("callbacks", None)
    quiet = {"diagnose_steps": 0, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return kind(
        lm,
        target=case.build(lm),
        prompt=case.prompt,
        support=case.support(),
        train_dataset=[ROW],
        args=GFNConfig(**{**quiet, **settings, "output_dir": folder, "per_device_train_batch_size": 1}),
        adapter=RANK,
        callbacks=callbacks,
    )


def gflownet(problem: Problem, budget: Budget, seed: int, objective: str) -> Policy:
    settings = {
        "objective": objective,
        "max_steps": budget.updates,
        "num_samples": budget.samples,
        "learning_rate": LEARNING_RATE.get(objective, GFLOWNET_RATE),
        "hard_penalty": PENALTY,
        **SETTINGS.get(objective, {}),
        "buffer_size": 2 * budget.samples,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(problem.lm, problem.case, folder, **settings)
        trainer.train()
    return trainer.policy


def sft(problem: Problem, budget: Budget, seed: int) -> Policy:
    """On exact draws of the posterior, which only an oracle has: as many as the others draw completions."""
    from amortlm.lab.baselines.sft import train_sft

    truth = problem.truth
    index = np.random.default_rng([seed, 3]).choice(len(truth.p), budget.passes, p=truth.p / truth.p.sum())
    policy = problem.policy(seed)
    with tempfile.TemporaryDirectory() as folder:
        return train_sft(
            policy,
            [ROW],
            [[truth.completions[i] for i in index.tolist()]],
            output_dir=folder,
            max_steps=budget.updates,
            learning_rate=LEARNING_RATE["sft"],
            batch_size=budget.samples,
            seed=seed,
        )


def reward_of(problem: Problem) -> Callable[[Rollouts], Tensor]:
    """log R - log q_0 in the place of a reward: with a KL penalty of weight 1 its optimum is the posterior itself."""
    reference = Policy(problem.lm, problem.case.prompt, problem.case.support(), default_lora(1))
    target = problem.training_target()

    def reward(rollouts: Rollouts) -> Tensor:
        log_q = reference.evaluate(rollouts).final(rollouts.lengths)
        return target.score_final(rollouts) - log_q.detach()

    return reward


def ppo(problem: Problem, budget: Budget, seed: int) -> Policy:
    from amortlm.lab.baselines.ppo import PPOConfig, train_ppo

    policy = problem.policy(seed)
    config = PPOConfig(
        max_steps=budget.updates,
        num_samples=budget.samples,
        minibatches=2,
        learning_rate=LEARNING_RATE["ppo"],
        beta=1.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        return train_ppo(policy, [ROW], reward_of(problem), config=config, output_dir=folder, seed=seed)


def grpo(problem: Problem, budget: Budget, seed: int) -> Policy:
    """As it is used: advantages divided by their spread, and a small KL penalty; its optimum is not the posterior."""
    from amortlm.lab.baselines.grpo import train_grpo

    policy = problem.policy(seed)
    with tempfile.TemporaryDirectory() as folder:
        return train_grpo(
            policy,
            [ROW],
            BoundedReward(problem.training_target().score_final),
            output_dir=folder,
            num_samples=budget.samples,
            max_steps=budget.updates,
            learning_rate=LEARNING_RATE["grpo"],
            beta=0.04,
            seed=seed,
        )


def trained(train: Train, corrections: Sequence[str] = ("sir",)) -> Run:
    """Train; then q itself, and what its corrections make of it at every budget."""

    def run(problem: Problem, budget: Budget, seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        policy = train(problem, budget, seed)
        seconds = time.perf_counter() - start
        log_q = policy_law(policy)
        curves = {name: CURVES[name](problem, log_q, seed) for name in ("q", *corrections)}
        accepted = float(np.exp(log_q)[np.isfinite(problem.truth.log_r)].sum())
        return {
            "training_seconds": seconds,
            "training_passes": budget.passes,
            "accepted": accepted,
            "curves": curves,
        }

    return run


def untrained(name: str) -> Run:
    def run(problem: Problem, budget: Budget, seed: int) -> dict[str, Any]:
        curve = CURVES[name](problem, problem.log_q, seed)
        return {"training_seconds": 0.0, "training_passes": 0, "curves": {name: curve}}

    return run


CURVES: dict[str, Callable[[Problem, Array, int], list[Point]]] = {
    "q": plain,
    "rejection": rejection,
    "best-of-n": best_of_n,
    "sir": sir,
    "mh": chain,
    "smc": smc,
}
MAIN = "gflownet-vargrad"  # judges finished text, too; the one that the claims are about
TRAINED: dict[str, Run] = {
    "sft": trained(sft),
    "ppo": trained(ppo),
    "grpo": trained(grpo),
    "forward-kl": trained(partial(gflownet, objective="forward_kl")),
    "gflownet-subtb": trained(partial(gflownet, objective="subtb")),
    "gflownet-db": trained(partial(gflownet, objective="db")),
    "gflownet-tb": trained(partial(gflownet, objective="tb")),
    MAIN: trained(partial(gflownet, objective="vargrad"), ("sir", "smc", "mh")),
}
UNTRAINED: dict[str, Run] = {"prompted": untrained("q")} | {
    name: untrained(name) for name in ("rejection", "best-of-n", "sir", "mh", "smc")
}
METHODS = UNTRAINED | TRAINED
EVERY_PREFIX = ("gflownet-subtb", "gflownet-db")  # cannot train on a target that judges finished text only
