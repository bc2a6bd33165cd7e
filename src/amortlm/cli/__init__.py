"""The command line: `amortlm train | sample | evaluate | ...`."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from amortlm.cli.checks import check_inputs
from amortlm.cli.options import make_parser
from amortlm.cli.status import ending_on_signals, exit_status, without_bars

QUICK = ("new", "completion")  # they need no model, and start at once


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 1 if `evaluate --check` finds that a certificate no longer holds; 2
    after an error, which is printed as one line; or 128 + n if signal n ended the command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    args.command_line = shlex.join(["amortlm", *(sys.argv[1:] if argv is None else argv)])
    with ending_on_signals():
        return exit_status(lambda: _run(args), args)


def _run(args: Namespace) -> int | None:
    if args.command not in QUICK:
        check_inputs(args)
    # The import may take seconds; a signal during it also ends the command.
    command = import_module(f"amortlm.cli.commands.{args.command.replace('-', '_')}")
    if args.command not in QUICK:
        without_bars()
    status: int | None = command.run(args)
    return status
