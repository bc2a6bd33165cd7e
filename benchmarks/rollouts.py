"""Time to quality with a server that draws on one core while the trainer learns on the other, against one process.

python -m benchmarks.rollouts MODEL --python .venv-vllm/bin/python [--updates 20] [--completions 64]

The task is that of random integers on the real model, whose posterior is known, so quality is the exact total
variation. Cases: one process on one core; one process with a thread on each of two cores; a server on one core and the
trainer on the other, with completions of the newest weights (lag 0) and drawn ahead (lag 1, 4). All run here, in turn,
on a machine that has nothing else to do; only ratios mean something. The server of the last cases is the same.

Column `drawing`: the share of its time that the trainer spends until it has its completions and their rewards.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import TrainerCallback

from amortlm import GFNConfig, GFNTrainer, LanguageModel
from amortlm.cli.status import ending_on_signals
from amortlm.lab.tasks import numbers
from amortlm.rollout.launch import Program, servable, servers
from amortlm.targets.spec import target_from_spec
from amortlm.train.spec import RunSpec

FIRST = 2  # updates that are not timed
RANK = 16


class Clock(TrainerCallback):
    """Seconds of each update, and of each until its completions are there."""

    def __init__(self, trainer: GFNTrainer):
        self.updates: list[float] = []
        self.drawing: list[float] = []
        prepare = trainer._prepare_inputs

        def timed(inputs: Any) -> Any:
            start = time.perf_counter()
            found = prepare(inputs)
            self.drawing.append(time.perf_counter() - start)
            return found

        trainer._prepare_inputs = timed  # type: ignore[method-assign]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.updates.append(time.perf_counter() - self.start)


def run(lm: LanguageModel, spec: RunSpec, given: argparse.Namespace, **settings: Any) -> list[float]:
    """[seconds of an update, share of drawing, exact total variation at the end]"""
    with tempfile.TemporaryDirectory() as folder:
        args = GFNConfig(
            output_dir=folder,
            objective="vargrad",
            max_steps=given.updates,
            num_samples=given.completions,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            diagnose_steps=0,
            save_strategy="no",
            use_cpu=True,
            behaviour={"tempered": 0.5},  # every update draws
            **settings,
        )
        trainer = GFNTrainer(
            lm,
            target=target_from_spec(spec.target, lm, spec._trust()),
            prompt=spec.prompt,
            support=spec.bare_support(),
            train_dataset=[{}],
            args=args,
            adapter=RANK,
        )
        clock = Clock(trainer)
        trainer.add_callback(clock)
        trainer.train()
        seconds, drawing = sum(clock.updates[FIRST:]), sum(clock.drawing[FIRST:])
        distance = numbers.exactness(trainer.posterior).total_variation
        return [seconds / (given.updates - FIRST), drawing / seconds, distance]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, or a GGUF file (make model)")
    parser.add_argument("--python", required=True, help="the interpreter of the environment that has vLLM")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--completions", type=int, default=64)
    given = parser.parse_args()
    lm = LanguageModel.from_pretrained(given.model)
    spec = numbers.SPEC.with_overrides(support=numbers.SPEC.support | {"max_tokens": 4})
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores[:threads])
        found[f"one process, {threads} cores"] = run(lm, spec, given)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[1]})
    with servable(given.model) as model, tempfile.TemporaryDirectory() as folder:
        python = pinned(Path(folder), given.python, cores[0])
        options = ["--dtype", "float32", "--enforce-eager", "--keep", "4", "--max-model-len", "128"]
        options += ["--max-lora-rank", str(RANK)]
        with servers(Program(python, model, options), 1) as urls:
            for lag in (0, 1, 4):
                settings = {"rollout": urls, "max_staleness": lag}
                found[f"server and trainer, lag {lag}"] = run(lm, spec, given, **settings)
    base = next(iter(found.values()))[0]
    rows = [[name, seconds, base / seconds, *more] for name, (seconds, *more) in found.items()]
    headers = ["", "s an update", "times faster", "drawing", "total variation"]
    print(tabulate(rows, headers=headers, floatfmt=".3f"))


def pinned(folder: Path, python: str, core: int) -> str:
    """A program that runs `python` on one core, with one thread."""
    file = folder / "python"
    command = f"taskset -c {core} {shlex.quote(python)}"
    file.write_text(
        "#!/bin/sh\n"
        f"export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND={core} VLLM_CPU_KVCACHE_SPACE=1\n"
        f'exec {command} "$@"\n'
    )
    file.chmod(0o755)
    return str(file)


if __name__ == "__main__":
    with ending_on_signals():  # the servers end with the block that started them
        main()
