"""amortlm evaluate: how far a saved sampler is from the posterior; does its certificate still hold?"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from amortlm import card
from amortlm.cli.checks import check_counts, check_file
from amortlm.cli.loading import loaded, locate, posterior_of, rows_of
from amortlm.cli.status import told_once
from amortlm.data import check_rows
from amortlm.diagnostics import certificate
from amortlm.diagnostics.diagnose import LEVEL, Gold
from amortlm.errors import CheckpointError, ConfigError
from amortlm.types import Row, finite


def run(args: Namespace) -> int:
    check_counts(("-n", args.n), ("--rows", args.rows))
    level = LEVEL if args.level is None else args.level
    if not 0 < level < 1:
        raise ConfigError(f"--level must lie between 0 and 1, got {level:g}")
    if args.output:
        check_file(args.output)
    if args.card and not Path(args.folder).is_dir():
        raise ConfigError(
            f"--card writes into a folder, and {args.folder} is none here: evaluate the folder, then push"
        )
    if args.quick and (args.card or args.check):
        other = "--card" if args.card else "--check"
        raise ConfigError(f"{other} needs the whole diagnosis: leave out --quick")
    if args.check:
        return _check(args)
    posterior, rows = loaded(args)
    rows = rows[: args.rows]
    gold = _gold(rows, args.gold)
    with told_once("amortlm.inference.truth", "; --quick leaves them out"):
        diagnosis = posterior.diagnose(
            rows, args.n, seed=args.seed, level=level, gold=gold, chains=not args.quick
        )
    print(diagnosis)
    if args.output:
        text = json.dumps(finite([row.to_dict() for row in diagnosis.rows]), indent=2) + "\n"
        Path(args.output).write_text(text, encoding="utf-8")
        print(f"wrote {args.output}")
    if args.card:
        posterior.save_card(args.folder, rows, diagnosis)
        print(f"wrote {Path(args.folder) / card.FILE}")
    return 0


def _gold(rows: Sequence[Row], column: str | None) -> Gold | None:
    if column is None:
        return None
    check_rows(rows, {column}, "--gold", why="")
    return [[str(row[column])] for row in rows]


def _check(args: Namespace) -> int:
    locate(args)
    folder = Path(args.folder)
    if (folder / "posterior.json").exists() and not (folder / certificate.FILE).exists():
        raise CheckpointError(
            f"{folder} has no certificate to check: training with --set stop_at_gap=0.05 (in YAML: config: "
            "{stop_at_gap: 0.05}) saves one when it reaches that gap"
        )
    known = args.data or args.column or (folder / "rows.jsonl").exists()
    posterior = posterior_of(args)
    found = certificate.check(
        posterior.policy,
        posterior.target,
        certificate.Certificate.load(folder),
        seed=args.seed,
        data_hash=certificate.hash_rows(rows_of(args)) if known else None,
        adapter_hash=certificate.hash_adapter(folder),
    )
    print(found.line if found.holds else f"amortlm: {found.line}", file=None if found.holds else sys.stderr)
    return 0 if found.holds else 1
