"""The command line of an experiment. Heavy imports wait until the options are read."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amortlm.lab.experiment import Experiment
    from amortlm.lab.runner import Plan


def add_options(parser: ArgumentParser, presets: Iterable[str]) -> None:
    parser.add_argument(
        "--preset", choices=list(presets), default="small", help="of settings (default small)"
    )
    parser.add_argument("--model", help="hub name or local folder (default: the preset's)")
    parser.add_argument(
        "--data", type=Path, help="file or folder that the experiment reads (default: its own)"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these, by name or as 'sft-*' (default: all)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default 3; smoke: 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the preset, or any field of one of its groups: steps=50, gflownet.epsilon=0.1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build every method up to its first step; write nothing"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="README.md and figures from results.json; run nothing"
    )
    parser.add_argument("--output", type=Path, help="output folder (default: runs/EXPERIMENT-PRESET)")
    parser.set_defaults(is_helper=False)


def output_of(experiment: Experiment, args: Namespace) -> Path:
    return Path(args.output or f"runs/{experiment.name}-{args.preset}")


def perform(
    experiment: Experiment,
    args: Namespace,
    command: str,
    helpers: Callable[[Plan], AbstractContextManager[int]] = lambda plan: nullcontext(0),
) -> None:
    """Do what the options ask for. helpers: a context that starts processes to share the runs, gives their number, and
    waits for them at its end. Raises AmortLMError."""
    from amortlm.lab import runner
    from amortlm.lab.report import report_again, table
    from amortlm.settings import named_texts

    output = output_of(experiment, args)
    if args.report_only:
        print(f"\n{table(experiment, report_again(experiment, output))}")
        return
    plan = runner.make_plan(
        experiment,
        args.preset,
        output,
        model=args.model,
        data=args.data,
        methods=args.methods,
        seeds=args.seeds,
        overrides=named_texts(args.set, "--set"),
        command=command,
    )
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars  # slow to import

        disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from one library about another
        if args.dry_run:
            runner.dry_run(plan)
            return
        with helpers(plan) as others:
            runner.execute(plan, processes=1 + others if sys.stdout.isatty() else 0)
    if args.is_helper:
        return
    print(f"\n{table(experiment, runner.report(plan))}")  # again, for what the helpers finished last
    if left := plan.left():
        print(f"{left} of {len(plan.runs())} runs are not finished: other processes work on them")
    print(f"wrote {output / 'README.md'}")


def main(experiment: Experiment, argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """An experiment as a script: a recipe or a benchmark. program: how it is called, if not by its file."""
    import torch
    from transformers.utils import logging as hf_logging

    parser = ArgumentParser(prog=program, description=experiment.question)
    add_options(parser, experiment.presets)
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)  # small models on few cores: more threads are slower
    given = sys.argv[1:] if argv is None else argv
    perform(experiment, args, shlex.join([*(program or f"python {sys.argv[0]}").split(), *given]))
