"""What an update costs: against the bare model passes it needs, and against the paper's procedure (`paper_loop.py`).

    python -m benchmarks.speed update --models embedded gpt2-small --tasks continuation infilling
    python -m benchmarks.speed growth --axes tokens samples
    python -m benchmarks.speed memory --tokens 64
    python -m benchmarks.speed training --tasks infilling --rows 48 --updates 120

update: all parts run in turn in one process, so ratios hold on a busy machine; medians of at least five repetitions.
growth: sizes are doubled, and the exponent of the cost fitted. memory: the peak of one update, a process for each.
training: updates of a real run, which comes back to its prompts, with its rewards remembered and with all asked again.
Models: "embedded", a path, or "gpt2-small" (its configuration, random weights). Written for CUDA too (`--device cuda`,
`--dtype bfloat16`), where it has not been run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import ReplayBuffer

from .speed_case import (
    TASKS,
    BarePasses,
    Case,
    Training,
    Update,
    build,
    clock,
    drawn,
    full_rollouts,
    generate,
    new_trainer,
    paper_batch,
    paper_update,
)

SIZES = {
    "samples": (4, 8, 16, 32),
    "tokens": (8, 16, 32, 64),
    "prompts": (2, 4, 8, 16),
    "context": (16, 32, 64, 128),
    "suffix": (8, 16, 32, 64),
    "buffer": (50, 100, 200, 400),
}


def alternate(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each part: all parts in turn, `repeats` times after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, work in parts.items():
            seconds = _seconds(work)
            if repeat:
                times[name].append(seconds)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios within a repetition: what else the machine does then is in both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure_update(case: Case, repeats: int, yardstick: bool) -> dict[str, Any]:
    """Medians in ms of the update's phases, the floor's parts and the yardstick, and the ratios between them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, folder)
        update = Update(trainer)
        rollouts = trainer.source.thin(drawn(trainer, update.rows, (0, 0)), (0, 0))
        bare, batch = BarePasses(trainer, rollouts), paper_batch(trainer, rollouts)
        parts: dict[str, Callable[[], Any]] = {"update": update, **bare.parts()}
        parts["sample"] = lambda: trainer.policy.sample(update.rows, case.samples, seed=0)
        parts["generate"] = lambda: generate(trainer, rollouts)
        if yardstick:
            parts["paper"] = lambda: paper_update(trainer, batch)
            if case.task == "continuation":
                parts["paper, one reference pass"] = lambda: paper_update(trainer, batch, False)
        times = alternate(parts, repeats)
    floor = [sum(part) for part in zip(*(times[name] for name in bare.parts()), strict=True)]
    ratios = {"update / floor": ratio(times["update"], floor)}
    ratios["sample / generate"] = ratio(times["sample"], times["generate"])
    ratios |= {f"{name} / update": ratio(t, times["update"]) for name, t in times.items() if "paper" in name}
    phases = {name: seconds[1:] for name, seconds in update.seconds.items()}
    return {
        "case": asdict(case),
        "trajectories": len(rollouts),
        "tokens": int(rollouts.lengths.sum()),
        "branch_tokens": bare.branch_tokens,
        "phases_ms": _medians(phases),
        "parts_ms": _medians({**times, "floor": floor}),
        "ratios": ratios,
    }


def measure_growth(case: Case, axis: str, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Median ms at each size, and the exponents of cost ~ size^e: fitted over all sizes, and of the last doubling.

    Completions have full length, so that sizes are what they say.
    """
    with tempfile.TemporaryDirectory() as folder:
        if axis == "buffer":
            parts = {str(n): _offer(case, n) for n in sizes}
        else:
            sized: list[dict[str, Any]] = [{axis: n} for n in sizes]
            cases = [replace(case, full_length=True, **size) for size in sized]
            parts = {str(n): Update(build(c, folder)) for n, c in zip(sizes, cases, strict=True)}
        medians = _medians(alternate(parts, repeats))
    x, y = [math.log(n) for n in sizes], [math.log(ms) for ms in medians.values()]
    return {
        "case": asdict(case),
        "axis": axis,
        "ms": medians,
        "exponent": statistics.linear_regression(x, y).slope,
        "last_doubling": (y[-1] - y[-2]) / (x[-1] - x[-2]),
    }


def _offer(case: Case, size: int) -> Callable[[], None]:
    """Offer one batch of good random completions to full buffers of `size` completions a prompt."""
    torch.manual_seed(0)
    prompts = [{"x": str(n)} for n in range(case.prompts)]
    stored = full_rollouts(prompts, size, case.tokens)
    fresh = full_rollouts(prompts, case.samples, case.tokens)
    buffer = ReplayBuffer(size)
    buffer.add(stored, torch.rand(len(stored)))
    state = {key: list(entries) for key, entries in buffer._entries.items()}

    def offer() -> None:
        buffer._entries = {key: list(entries) for key, entries in state.items()}
        buffer.add(fresh, 1 + torch.rand(len(fresh)))

    return offer


def measure_training(case: Case, rows: int, updates: int) -> dict[str, Any]:
    """Medians in ms over the second half of a run; "judged": of the stopping states that a run without a reward memory
    asks the target about, the share that one with it does. The paper's procedure on the samples of three batches."""
    half = updates // 2
    with tempfile.TemporaryDirectory() as folder:
        again = Training(new_trainer(case, folder, rows, max_steps=updates), forget=True)
        run = Training(new_trainer(case, folder, rows, max_steps=updates), forget=False)
        every = case.task == "infilling"  # the released code scores continuation in one pass
        paper = [_seconds(partial(paper_update, run.trainer, run.samples(n), every)) for n in range(3)]
    times = {"all asked again": again.seconds[half:], "update": run.seconds[half:], "paper": paper}
    medians = _medians(times)
    return {
        "case": asdict(case),
        "rows": rows,
        "updates": updates,
        "ms": medians,
        "judged": sum(run.asked[half:]) / sum(again.asked[half:]),
        "ratios": {
            f"{name} / update": medians[name] / medians["update"] for name in times if name != "update"
        },
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = clock()
    work()
    return clock() - start


def measure_memory(case: Case, variants: Sequence[str]) -> dict[str, Any]:
    """Peak MiB of one update above what the loaded models take, each variant in a process of its own."""
    peaks = {variant: _peak_of_process(case, variant) for variant in variants}
    above = {variant: peak["peak"] - peak["loaded"] for variant, peak in peaks.items()}
    return {"case": asdict(case), "mib": peaks, "update / paper": above["update"] / above["paper"]}


def _peak_of_process(case: Case, variant: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed", "peak", "--variant", variant]
    command += ["--case", json.dumps(asdict(case)), "--threads", str(torch.get_num_threads())]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def peak(case: Case, variant: str) -> dict[str, float]:
    """Memory in MiB before and at the peak of one update ("update", "paper") of this process.

    For continuation the yardstick scores in one pass: that takes as much memory as a pass for each prefix.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, folder)
        full = full_rollouts(list(trainer.train_dataset), case.samples, case.tokens, trainer.policy)
        batch, per_prefix = paper_batch(trainer, full), case.task != "continuation"
        work = Update(trainer) if variant == "update" else lambda: paper_update(trainer, batch, per_prefix)
        loaded = _peak_mib(case.device)
        work()
        return {"loaded": loaded, "peak": _peak_mib(case.device)}


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1000 * statistics.median(t) for name, t in times.items()}


def _title(case: dict[str, Any]) -> str:
    default = asdict(Case())
    named = [f"{case['task']} on {case['model']}: {case['prompts']} prompts x {case['samples']} samples"]
    named.append(f"{case['tokens']} tokens")
    rest = [k for k in case if k not in ("task", "model", "prompts", "samples", "tokens")]
    return ", ".join(named + [f"{k} {case[k]}" for k in rest if case[k] != default[k]])


def show(result: dict[str, Any]) -> None:
    print(_title(result["case"]))
    if "phases_ms" in result:
        total = result["parts_ms"]["update"]
        rows = [[name, ms, 100 * ms / total] for name, ms in result["phases_ms"].items()]
        print(tabulate(rows, headers=["phase", "ms", "%"], floatfmt=".1f"))
        print(tabulate(result["parts_ms"].items(), headers=["whole", "ms"], floatfmt=".0f"))
        print("   ".join(f"{name} = {value:.2f}" for name, value in result["ratios"].items()))
    elif "judged" in result:
        print(
            tabulate(
                [result["ms"].values()], headers=[f"{name}, ms" for name in result["ms"]], floatfmt=".0f"
            )
        )
        print(
            f"{result['updates']} updates on {result['rows']} rows; states judged: {result['judged']:.2f} of all"
        )
        print("   ".join(f"{name} = {value:.2f}" for name, value in result["ratios"].items()))
    elif "axis" in result:
        print(
            tabulate(
                [result["ms"].values()],
                headers=[f"{result['axis']} {n}" for n in result["ms"]],
                floatfmt=".1f",
            )
        )
        print(f"exponent {result['exponent']:.2f}, of the last doubling {result['last_doubling']:.2f}")
    else:
        rows = [[name, m["loaded"], m["peak"]] for name, m in result["mib"].items()]
        print(tabulate(rows, headers=["", "loaded, MiB", "peak"], floatfmt=".0f"))
        print(f"update / paper, above loaded = {result['update / paper']:.2f}")
    print(flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("update", "growth", "memory", "training", "peak"))
    parser.add_argument("--models", nargs="+", default=["embedded"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    for field in fields(Case):
        if field.name not in ("task", "model"):
            kind = {"bool": None, "str": str}.get(str(field.type), int)
            option = "--" + field.name.replace("_", "-")
            if kind is None:
                parser.add_argument(option, action="store_true")
            else:
                parser.add_argument(option, type=kind, default=field.default)
    parser.add_argument("--axes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="of growth")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=48, help="of training")
    parser.add_argument("--updates", type=int, default=120, help="of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-yardstick", action="store_true", help="leave the paper's procedure out")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # of one process of `memory`
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = {f.name: getattr(args, f.name) for f in fields(Case) if f.name not in ("task", "model")}
    results = []
    for model in args.models:
        for task in args.tasks:
            case = Case(task=task, model=model, **settings)
            if args.what == "update":
                found = [measure_update(case, args.repeats, not args.no_yardstick)]
            elif args.what == "memory":
                found = [measure_memory(replace(case, full_length=True), ("update", "paper"))]
            elif args.what == "training":
                found = [measure_training(case, args.rows, args.updates)]
            else:
                axes = [a for a in args.axes if a != "suffix" or task == "infilling"]
                found = [measure_growth(case, axis, SIZES[axis], args.repeats) for axis in axes]
            for result in found:
                show(result)
            results += found
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if args.what == "peak":
        print(json.dumps(peak(Case(**json.loads(args.case)), args.variant)))
        return
    results = run(args)
    if args.json:
        about = {"machine": platform.processor() or platform.machine(), "threads": args.threads}
        about |= {"torch": torch.__version__, "transformers": transformers.__version__}
        args.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
