"""The command line: `amortlm train | sample | evaluate | ...`."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from amortlm.cli.options import make_parser
from amortlm.cli.status import ending_on_signals, exit_status, without_bars
from amortlm.errors import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 1 if `evaluate --check` finds that a certificate no longer holds; 2
    after an error, which is printed as one line; or 128 + n if signal n ended the command."""
    args = _parsed(argv)
    args.command_line = shlex.join(["amortlm", *(sys.argv[1:] if argv is None else argv)])
    with ending_on_signals():
        return exit_status(lambda: _run(args), args)


def _parsed(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    own = vars(args).pop("own_parser")  # of the command: it knows which options there are
    if unknown:
        hint = f"; {nearest(unknown[0], own._option_string_actions)}" if unknown[0][0] == "-" else ""
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def _run(args: Namespace) -> int | None:
    # The import may take seconds; a signal during it also ends the command.
    command = import_module(f"amortlm.cli.commands.{args.command}")
    without_bars()
    status: int | None = command.run(args)
    return status
