"""The command line: `amortlm train | sample | evaluate | doctor | reproduce`. Heavy imports wait for a command."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from amortlm import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 where `evaluate --check` says no, 2 after printing one error line,
    or 128 + n where signal n ended it."""
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["amortlm", *(sys.argv[1:] if argv is None else argv)])
    with _ending_on_signals():
        return run(args)


class Ended(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """These signals end a command in order, as Ctrl-C does, and not in silence."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names if hasattr(signal, n)}
    taken = {number: handler for number, handler in before.items() if handler == signal.SIG_DFL}
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    """A command whose arguments are parsed already."""
    from amortlm.errors import AmortLMError

    try:
        from amortlm.cli import commands  # seconds, in which a signal is in order, too

        status: int | None = getattr(commands, args.command)(args)
    except AmortLMError as e:
        print(
            "amortlm:", " ".join(str(e).split()), file=sys.stderr
        )  # one line, whatever the library beneath says
        return 2
    except OSError as e:
        print(f"amortlm: {e}. What was saved before is intact.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Ended) as e:
        number = e.args[0] if isinstance(e, Ended) else signal.SIGINT
        print(f"amortlm: ended by {signal.Signals(number).name}{_what_remains(args)}", file=sys.stderr)
        return 128 + number
    return status or 0


def _what_remains(args: argparse.Namespace) -> str:
    if args.command == "reproduce":
        return "; the same command goes on from the last checkpoint"
    if args.command != "train":
        return ""
    if (run := sys.modules.get("amortlm.train.run")) is None:
        return " before anything was started"
    folder = run_folder(args)
    if run.is_finished(folder):
        return f"; {folder} holds a finished run"
    if run.can_resume(folder):
        return f"; the same command with --resume goes on from the last checkpoint in {folder}"
    return "; nothing was saved yet: the same command starts again"


def run_folder(args: argparse.Namespace) -> Path:
    """Where `amortlm train` writes."""
    return Path(args.output or f"runs/{Path(args.spec).stem}")


def _parser() -> argparse.ArgumentParser:
    from amortlm.lab.tasks import TASKS

    parser = argparse.ArgumentParser(
        prog="amortlm",
        description="Make a language model sample from posteriors that it defines but cannot sample.",
    )
    parser.add_argument("--version", action="version", version=f"amortlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train a sampler for a task or a YAML file")
    train.add_argument("spec", help=f"a task ({', '.join(TASKS)}) or a YAML file; see docs/yaml.md")
    train.add_argument("--model", help="hub name or local folder (default: the spec's)")
    train.add_argument("--data", help="rows as .jsonl, .json, .csv or .tsv (default: the spec's)")
    train.add_argument("--output", help="output folder (default: runs/NAME)")
    _add_trust(train)
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    again.add_argument("--overwrite", action="store_true", help="delete the run that the output folder holds")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any GFNConfig field, e.g. max_steps=50",
    )

    sample = commands.add_parser("sample", help="draw from a saved posterior")
    _add_posterior(sample)
    sample.add_argument("-n", type=int, default=5, help="completions per row (default 5)")
    sample.add_argument(
        "--correct",
        default="none",
        metavar="METHOD",
        help="sir, smc or mh: draws of the posterior itself as the budget grows; see docs/inference.md",
    )
    sample.add_argument(
        "--budget", type=int, help="completions drawn for a correction (default 256, or 16 n if that is more)"
    )
    sample.add_argument("--json", action="store_true", help="JSON lines instead of a table")

    evaluate = commands.add_parser("evaluate", help="how far a saved posterior is from the truth")
    _add_posterior(evaluate)
    evaluate.add_argument("-n", type=int, default=256, help="samples per row (default 256; fewer flatter)")
    evaluate.add_argument("--rows", type=int, default=8, help="evaluate at most so many rows (default 8)")
    evaluate.add_argument("--level", type=float, help="of the intervals (default 0.99)")
    evaluate.add_argument("--gold", metavar="COLUMN", help="a column with a completion known to be good")
    evaluate.add_argument("--output", help="write the figures to this JSON file")
    evaluate.add_argument(
        "--check",
        action="store_true",
        help="is the certificate in the folder still true? Exit status 0: yes, 1: no, 2: could not be checked",
    )
    doctor = commands.add_parser("doctor", help="which ways through a model are exact; see docs/models.md")
    doctor.add_argument("model", help="hub name or local folder")
    doctor.add_argument("--json", action="store_true", help="JSON instead of lines")
    _add_reproduce(commands.add_parser("reproduce", help="run one of the paper's experiments"))
    return parser


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    from amortlm.lab.command import add_options
    from amortlm.lab.experiments import EXPERIMENTS, PRESETS

    parser.add_argument("experiment", choices=EXPERIMENTS, help="see docs/reproduce.md")
    add_options(parser, PRESETS)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that share the runs (default 1)"
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, or a .py file, whose functions the target may call: its code is run (may be repeated)",
    )


def _add_posterior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder written by `amortlm train` or Posterior.save_pretrained")
    parser.add_argument("--data", help="rows as .jsonl, .json, .csv or .tsv")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="one row on the command line, e.g. x='...'",
    )
    parser.add_argument("--model", help="the frozen model, if it is not where it was in training")
    _add_trust(parser)
    parser.add_argument("--seed", type=int, default=0)
