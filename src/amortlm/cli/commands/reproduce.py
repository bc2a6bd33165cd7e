"""amortlm reproduce: one of the paper's experiments, in one or several processes."""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess

import torch

from amortlm.cli.checks import check_counts, check_folder
from amortlm.cli.status import exit_status, without_bars
from amortlm.errors import TrainingError


def run(args: Namespace) -> None:
    from amortlm.lab import command
    from amortlm.lab.experiments import load_experiment

    experiment = load_experiment(args.experiment)
    check_counts(("--jobs", args.jobs), ("--seeds", args.seeds))
    check_folder(command.output_of(experiment, args))
    helpers: list[SpawnProcess] = []
    command.perform(experiment, args, args.command_line, lambda plan: processes(args, plan.left(), helpers))
    failed = [helper.exitcode for helper in helpers if helper.exitcode]
    if failed:
        raise TrainingError(
            f"a process of --jobs ended with exit status {failed[0]}; the same command runs the missing runs"
        )


@contextmanager
def processes(args: Namespace, runs: int, helpers: list[SpawnProcess]) -> Iterator[int]:
    """Start helper processes for the same runs in the same folder (`Store.taken`); yields their number.

    Without --jobs there are none. At the end this process waits for them. An error here ends them; their checkpoints
    stay.
    """
    count = 0 if args.is_helper else min(args.jobs, runs) - 1
    if count < 1:
        yield 0
        return
    threads = torch.get_num_threads()
    share = max(1, threads // args.jobs)
    helper = Namespace(**{**vars(args), "is_helper": True})
    helpers += [get_context("spawn").Process(target=_help, args=(helper, share)) for _ in range(count)]
    torch.set_num_threads(share)
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that helpers do not outlive this process
    try:
        for each in helpers:
            each.start()
        yield count
    except BaseException:
        for each in helpers:
            if each.pid is not None:
                each.terminate()
        raise
    finally:
        for each in helpers:
            if each.pid is not None:
                each.join()
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(threads)


def _help(args: Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    without_bars()
    sys.exit(exit_status(lambda: run(args), args))
