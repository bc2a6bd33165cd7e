"""amortlm report: a page about runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from amortlm.cli.checks import check_counts, check_file
from amortlm.posterior import Posterior
from amortlm.report import is_measured, measure, write_report


def run(args: Namespace) -> None:
    check_counts(("-n", args.n))
    if args.output:
        check_file(args.output)
    for folder in () if args.quick else args.folders:
        if (Path(folder) / "posterior.json").exists() and not is_measured(folder, args.n, args.seed):
            posterior = Posterior.from_pretrained(folder, lm=args.model, trust=args.trust)
            measure(posterior, folder, args.n, seed=args.seed)
    print(f"wrote {write_report(args.folders, args.output)}")
