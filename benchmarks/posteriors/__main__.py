"""Every method against the same truth: posteriors that can be enumerated, on the embedded model.

    python -m benchmarks.posteriors --output results/posteriors

Saves each (target, method, seed) as it finishes, and goes on from there; writes results.json, README.md and figures.
Methods that train nothing have an exact (or simulated) law, and one seed.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from amortlm import LanguageModel
from amortlm.errors import ConfigError, nearest
from amortlm.lab.reproduce.storage import environment, finite, write_json

from . import methods as m
from .cases import BY_NAME
from .report import write_report

SETTINGS = "settings.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", default="embedded", help="embedded, or a folder or hub name")
    parser.add_argument("--targets", nargs="+", default=list(BY_NAME), help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--methods", nargs="+", default=list(m.METHODS), help=f"of {', '.join(m.METHODS)}")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of what is trained (default 1)")
    parser.add_argument("--updates", type=int, default=100, help="updates of a training run (default 100)")
    parser.add_argument("--samples", type=int, default=32, help="completions of an update (default 32)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/posteriors"))
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished")
    args = parser.parse_args(argv)
    for what, given, known in (("target", args.targets, BY_NAME), ("method", args.methods, m.METHODS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}; {nearest(name, known)}")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one folder share."""
    return {
        "model": args.model,
        "updates": args.updates,
        "samples": args.samples,
        "lora_rank": m.RANK,
        "learning_rate": m.LEARNING_RATE | {"gflownet": m.GFLOWNET_RATE},
        "hard_penalty": m.PENALTY,
        "gflownet": m.SETTINGS,
    }


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where the folder holds runs of other settings."""
    file = folder / SETTINGS
    if file.exists() and json.loads(file.read_text()) != settings and any((folder / "runs").glob("*.json")):
        raise ConfigError(f"{folder} holds runs of other settings: give another --output, or delete it")
    write_json(file, settings)


def run_file(folder: Path, target: str, method: str, seed: int) -> Path:
    return folder / "runs" / f"{target}-{method}-seed{seed}.json"


def todo(args: argparse.Namespace, target: str) -> list[tuple[str, int]]:
    """(method, seed) of a target that are not finished: all methods before any second seed."""
    out = []
    for seed in range(args.seeds):
        for method in m.METHODS:
            if method not in args.methods or (seed > 0 and method in m.UNTRAINED):
                continue
            if method in m.EVERY_PREFIX and BY_NAME[target].finished_only:
                continue
            if not run_file(args.output, target, method, seed).exists():
                out.append((method, seed))
    return out


def run_target(args: argparse.Namespace, lm: LanguageModel, target: str) -> None:
    runs = todo(args, target)
    if not runs:
        return
    start = time.perf_counter()
    problem = m.Problem.of(BY_NAME[target], lm)
    print(f"{target}: {len(problem.truth.p)} completions, {time.perf_counter() - start:.0f} s", flush=True)
    for method, seed in runs:
        start, cpu = time.perf_counter(), time.process_time()
        found = m.METHODS[method](problem, m.Budget(args.updates, args.samples), seed)
        seconds = time.perf_counter() - start
        run = {"target": target, "method": method, "seed": seed, **found, "seconds": seconds}
        run |= {
            "cpu_seconds": time.process_time() - cpu,
            "facts": m.facts(problem),
            "environment": environment(),
        }
        write_json(run_file(args.output, target, method, seed), finite(run))
        best = {name: f"{curve[-1]['tv']:.3f}" for name, curve in found["curves"].items()}
        print(f"  {method}, seed {seed}: TV at most passes {best}, {seconds:.0f} s", flush=True)
        gc.collect()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    settings = settings_of(args)
    claim(args.output, settings)
    given = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--report-only"]
    command = "python -m benchmarks.posteriors " + shlex.join(given)
    if not args.report_only:
        lm = LanguageModel.from_pretrained(args.model)
        for target in args.targets:
            run_target(args, lm, target)
            write_report(args.output, settings, command)
    write_report(args.output, settings, command)


if __name__ == "__main__":
    main()
