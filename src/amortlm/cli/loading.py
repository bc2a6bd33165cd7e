"""The posterior and the rows that a command is about."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from amortlm import hub
from amortlm.data import load_rows
from amortlm.errors import DataError
from amortlm.posterior import Posterior
from amortlm.settings import named_texts
from amortlm.types import Row


def loaded(args: Namespace) -> tuple[Posterior, Sequence[Row]]:
    """The posterior and its rows. Rows of --column and --data are read first, because loading a model takes long."""
    given = rows_of(args) if args.column or args.data else None
    return posterior_of(args), given or rows_of(args)


def posterior_of(args: Namespace) -> Posterior:
    locate(args)
    return Posterior.from_pretrained(args.folder, lm=args.model, trust=args.trust)


def locate(args: Namespace) -> None:
    """Replace a name on the hub by the folder of its download."""
    args.folder, args.revision = str(hub.locate(args.folder, args.revision)), None


def rows_of(args: Namespace) -> Sequence[Row]:
    """--column, --data, or the rows that the posterior was trained on."""
    if args.column:
        return [named_texts(args.column, "--column")]
    if args.data:
        return load_rows(args.data)
    saved = Path(args.folder) / "rows.jsonl"
    if not saved.exists():
        raise DataError("no rows are given: give --column NAME=TEXT (once per column) or --data FILE")
    return load_rows(saved)


def print_row(row: Row) -> None:
    for name, value in row.items():
        print(textwrap.fill(f"{name}: {value}", 100, subsequent_indent="   "))
