"""How long until the sampler is right? Ours, the paper's procedure, and TRL's GRPO, on posteriors known exactly.

    python -m benchmarks.quality

CPU seconds of updates (sampling, scoring, gradient, optimiser) until the exact total variation passes a mark. The
paper's procedure is `paper_loop.py` with SubTB and the paper's mix of behaviours, at the same model, samples, adapter,
learning rate and schedule; bookkeeping of its replay buffer is free here, and what it replays it scores again. GRPO
maximises log R less .04 nats per nat of KL; it is given at least the time that the paper's procedure took. Learning
rate and batch are those of `benchmarks/posteriors`, the targets are others. One prompt with few strings is the best
case for a trainer that remembers rewards, as ours does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from amortlm import GFNTrainer, LanguageModel, Policy
from amortlm.lab.experiment import Context

from . import paper_loop
from .posteriors import methods
from .posteriors.cases import FEELINGS, Case, model, policy_law
from .speed_case import clock, paper_batch

FRIDGE = "Anna opened the fridge. She was"
BALL = "Ben lost his red ball. He was"
CAT = "The old cat was"
CASES = [
    Case("infill, short y", FRIDGE, [model(FRIDGE, "{z} She ate it all.")], FEELINGS),
    Case(
        "infill, long y",
        BALL,
        [model(BALL, "{z} Then his mother found it under the bed, and they played all day.")],
        FEELINGS,
    ),
    Case("tempered", CAT, [model(CAT, temperature=0.8)], FEELINGS),
]
PAPER = {"objective": "subtb", "behaviour": {"replay": 0.25, "tempered": 0.5025}}
OURS: dict[str, dict[str, Any]] = {
    "SubTB": {"objective": "subtb"},
    "VarGrad": {"objective": "vargrad"},
    "VarGrad, own samples": {"objective": "vargrad", "behaviour": {"policy": 1.0}},
}
GRPO = "GRPO"
Point = tuple[int, float, float]  # updates, seconds, total variation


class Stopwatch(TrainerCallback):
    """Seconds of updates alone; every `every` of them the distance is measured, off the clock."""

    def __init__(self, problem: methods.Problem, every: int, mark: float):
        self.problem, self.every, self.mark = problem, every, mark
        self.seconds, self.started = 0.0, 0.0
        self.curve: list[Point] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += clock() - self.started
        if state.global_step % self.every == 0:
            distance = total_variation(self.problem, kwargs["model"])
            self.curve.append((state.global_step, self.seconds, distance))
            control.should_training_stop |= distance <= self.mark

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = clock()
        yield
        self.started += clock() - start


class PaperTrainer(GFNTrainer):
    """The paper's procedure on samples that our trainer draws, off the clock: the plain loop draws as many itself."""

    watch: Stopwatch

    def _prepare_inputs(self, inputs: Any) -> Any:
        with self.watch.paused():
            return paper_batch(self, super()._prepare_inputs(inputs).rollouts)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # The released code scores in one pass where nothing follows z.
        return paper_loop.loss(self.policy.model, self.lm.model, inputs, pass_per_prefix=any(inputs.after))


def total_variation(problem: methods.Problem, policy: Policy) -> float:
    q = np.exp(policy_law(policy))
    return 0.5 * float(np.abs(q / q.sum() - problem.truth.p).sum())


def train(
    kind: type[GFNTrainer], problem: methods.Problem, settings: dict[str, Any], seed: int, args: Any
) -> list[Point]:
    """(updates, seconds, total variation) on the way to the mark."""
    watch = Stopwatch(problem, args.every, args.mark)
    settings = {
        "max_steps": args.updates,
        "num_samples": args.samples,
        "learning_rate": methods.SETTINGS["gflownet"]["learning_rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "seed": seed,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = methods.trainer_of(
            problem.lm, problem.case, folder, kind=kind, callbacks=[watch], **settings
        )
        if isinstance(trainer, PaperTrainer):
            trainer.watch = watch
        trainer.train()
    return watch.curve


def grpo(problem: methods.Problem, seconds: float, seed: int, args: Any) -> Point:
    """The end of a run that has at least so many seconds of updates: a run of one update is what setting up costs."""
    _, start_up = _timed_grpo(problem, 1, seed, args)
    updates = args.updates // 4
    while True:
        policy, taken = _timed_grpo(problem, updates, seed, args)
        if taken - start_up >= seconds:
            return updates, taken - start_up, total_variation(problem, policy)
        updates = int(updates * max(1.2, 1.1 * seconds / max(taken - start_up, 1e-3)))


def _timed_grpo(problem: methods.Problem, updates: int, seed: int, args: Any) -> tuple[Policy, float]:
    start = clock()
    settings = {**methods.SETTINGS, "updates": updates, "samples": args.samples}
    with tempfile.TemporaryDirectory() as folder:
        train, _ = methods.TRAINED["grpo"]
        trained = train(Context(settings, problem.lm, seed=seed, folder=Path(folder)), problem)
    return trained.sampler.policy, clock() - start


def measure(problem: methods.Problem, seed: int, args: Any) -> dict[str, list[Point]]:
    found = {"paper": train(PaperTrainer, problem, PAPER, seed, args)}
    for name, settings in OURS.items():
        found[name] = train(GFNTrainer, problem, settings, seed, args)
    found[GRPO] = [grpo(problem, found["paper"][-1][1], seed, args)]
    return found


def report(runs: Sequence[dict[str, Any]], mark: float) -> str:
    """Medians over seeds; a run that never passes the mark counts with what it spent, and is told of."""
    table = []
    for target in dict.fromkeys(run["target"] for run in runs):
        of_target = [run["curves"] for run in runs if run["target"] == target]
        paper = median(curves["paper"][-1][1] for curves in of_target)
        for name in of_target[0]:
            ends = [curves[name][-1] for curves in of_target]
            passed = sum(tv <= mark for _, _, tv in ends)
            updates, seconds, tv = (median(column) for column in zip(*ends, strict=True))
            table.append([target, name, f"{passed} of {len(ends)}", updates, seconds, tv, paper / seconds])
    headers = [
        "target",
        "procedure",
        f"TV ≤ {mark:g}",
        "updates",
        "CPU s",
        "TV at the end",
        "paper's s / its s",
    ]
    return tabulate(table, headers, "github", floatfmt=("", "", "", ".0f", ".1f", ".3f", ".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=200, help="at most")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--every", type=int, default=5, help="updates between two looks at the distance")
    parser.add_argument("--mark", type=float, default=0.1, help="total variation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every curve to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained("embedded")
    runs: list[dict[str, Any]] = []
    for case in CASES:
        problem = methods.Problem.of(case, lm)
        print(case.name, {k: round(v, 3) for k, v in methods.facts(problem).items()}, flush=True)
        for seed in range(args.seeds):
            curves = measure(problem, seed, args)
            runs.append({"target": case.name, "seed": seed, "curves": curves})
            print(seed, {name: curve[-1] for name, curve in curves.items()}, flush=True)
            if args.json:
                args.json.write_text(json.dumps({"mark": args.mark, "runs": runs}) + "\n")
    print(report(runs, args.mark))


if __name__ == "__main__":
    main()
