"""amortlm sample: draw from a saved posterior."""

from __future__ import annotations

import json
import textwrap
from argparse import Namespace

from tabulate import tabulate

from amortlm.cli.checks import check_counts
from amortlm.cli.loading import loaded, print_row
from amortlm.errors import ConfigError
from amortlm.inference.correct import check_method
from amortlm.posterior import Samples
from amortlm.types import finite

TEXT_WIDTH = 60


def run(args: Namespace) -> None:
    check_counts(("-n", args.n), ("--budget", args.budget))
    check_method(args.correct)
    if args.budget is not None and args.correct == "none":
        raise ConfigError("--budget is for corrected samples: also give --correct sir, smc or mh")
    posterior, rows = loaded(args)
    for row in rows[: None if args.data else 1]:
        samples = posterior.sample(row, args.n, correct=args.correct, budget=args.budget, seed=args.seed)
        summary = {} if samples.method == "none" else {"correction": samples.summary()}
        if args.json:
            for s in samples:
                print(json.dumps(finite({"row": dict(row), **s.to_dict(), **summary})))
            continue
        print_row(row)
        table = [[_wrap(s.text), s.log_q, s.log_reward, s.weight] for s in samples]
        headers = ["completion", "log q", "log R", "weight"]
        print(tabulate(table, headers=headers, floatfmt=".3f", disable_numparse=[0]))  # " 25." is text
        if summary:
            print(_how(samples))
        print()


def _how(samples: Samples) -> str:
    """One line on how corrected samples were drawn."""
    if samples.method == "mh":
        return f"mh: {samples.draws} draws, acceptance rate {samples.acceptance_rate:.2f}"
    return f"{samples.method}: {samples.draws} draws, ESS {samples.ess:.1f}, log Z {samples.log_z:.3f}"


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, TEXT_WIDTH))
