"""amortlm table: the most probable completions of a posterior."""

from __future__ import annotations

import json
from argparse import Namespace

from amortlm.cli.checks import check_counts
from amortlm.cli.loading import loaded, print_row
from amortlm.types import finite


def run(args: Namespace) -> None:
    check_counts(("-n", args.n), ("--top", args.top), ("--limit", args.limit))
    posterior, rows = loaded(args)
    for row in rows[: None if args.data else 1]:
        found = posterior.table(row, args.n, limit=args.limit, top=args.top, seed=args.seed)
        if args.json:
            print(json.dumps(finite({"row": dict(row), **found.to_dict()})))
        else:
            print_row(row)
            print(f"{found}\n")
