"""Around a command: what it prints besides its own lines, and its end: the exit status and the line that says why."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from amortlm.errors import AmortLMError


class Ended(BaseException):
    """Raised on SIGTERM and SIGHUP, as KeyboardInterrupt is on SIGINT."""


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: files are closed, and a line names the signal."""

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


def exit_status(work: Callable[[], int | None], args: Namespace) -> int:
    """Run `work`, the command of `args`, and return its exit status. If it fails, a line on stderr says why."""
    try:
        return work() or 0
    except AmortLMError as e:
        print(
            "amortlm:", " ".join(str(e).split()), file=sys.stderr
        )  # in one line, even if a library's message has several
        return 2
    except OSError as e:
        print(f"amortlm: {e}. Earlier saves are intact.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Ended) as e:
        number = e.args[0] if isinstance(e, Ended) else signal.SIGINT
        print(f"amortlm: ended by {signal.Signals(number).name}{_what_remains(args)}", file=sys.stderr)
        return 128 + number


def _what_remains(args: Namespace) -> str:
    if args.command == "reproduce":
        return "; the same command continues from the last checkpoint"
    if args.command != "train":
        return ""
    if (run := sys.modules.get("amortlm.train.run")) is None:
        return " before training was started"
    folder = run_folder(args)
    if run.is_finished(folder):
        return f"; {folder} holds a finished run"
    if run.can_resume(folder):
        return f"; the same command with --resume continues from the last checkpoint in {folder}"
    return "; nothing was saved yet: the same command starts again"


def without_bars() -> None:
    """Libraries draw no bars of their own while they load."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextlib.contextmanager
def told_once(name: str, hint: str) -> Iterator[None]:
    """On a terminal, what a module logs meanwhile is printed to stderr, each message once, followed by a hint."""
    if not sys.stderr.isatty():
        yield
        return
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stderr)
    told: list[str] = []

    def is_new(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return told.count(told[-1]) == 1

    handler.addFilter(is_new)
    handler.setFormatter(logging.Formatter(f"%(message)s{hint}"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def run_folder(args: Namespace) -> Path:
    """The output folder of `amortlm train`."""
    return Path(args.output or f"runs/{Path(args.spec).stem}")
