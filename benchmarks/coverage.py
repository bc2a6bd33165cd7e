"""Do the intervals for log Z hold what they promise? Seeded runs on posteriors whose log Z is known.

    python -m benchmarks.coverage
    python -m benchmarks.coverage --sampled infill-short regex-common contrastive
    python -m benchmarks.coverage --verdicts [TARGET ..] [--blind]

The targets of `benchmarks/posteriors`, each with two proposals: the prompted model, and a half-trained sampler,
the even mixture of it and the posterior. Every run has its own draws of both, by their exact laws, and is a miss where
log Z lies outside. The control reports every log q a nat too low, as a support that is not renormalised would: how many
of its intervals miss?

--sampled: `Posterior.diagnose` as it is where nothing can be enumerated. The draws of the posterior come from the
sampler itself, a policy trained for 100 updates, by SIR or by chains.

--verdicts: how often a sampler that has lost a mode is called right (`benchmarks/verdicts.py`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from statistics import median

import numpy as np
import torch
from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import LanguageModel
from amortlm.diagnostics.bounds import Interval, log_z_bounds

from . import verdicts
from .posteriors.cases import BY_NAME, CASES, ROW
from .posteriors.laws import Array, log_weights
from .posteriors.methods import PENALTY, Problem, trainer_of

BIAS = 1.0  # nats


def intervals(q: Array, log_w: Array, p: Array, args: argparse.Namespace, seed: int) -> list[Interval]:
    """One interval for each run: n draws of q [M] and m of p, weighed by log_w."""
    rng = np.random.default_rng(seed)
    weights, q, p = torch.from_numpy(log_w), q / q.sum(), p / p.sum()
    out = []
    for _ in range(args.runs):
        drawn, true = rng.choice(len(p), args.n, p=q), rng.choice(len(p), args.m, p=p)
        out.append(log_z_bounds(weights[drawn], weights[true], args.level))
    return out


def sampled(lm: LanguageModel, name: str, args: argparse.Namespace) -> list[object]:
    """How many intervals of a trained sampler hold log Z where its own draws stand for the posterior's."""
    problem = Problem.of(BY_NAME[name], lm)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"objective": "vargrad", "max_steps": 100, "num_samples": 32, "learning_rate": 1e-3}
        trainer = trainer_of(lm, problem.case, folder, **settings, hard_penalty=PENALTY)
        trainer.train()
    posterior, sources, inside, widths = trainer.posterior, Counter[str](), 0, []
    for seed in range(args.runs):
        found = posterior.diagnose(ROW, args.n, seed=seed, limit=0, level=args.level)
        sources[found.truth.source] += 1
        inside += problem.truth.log_z in found.bounds.log_z
        widths.append(found.bounds.log_z.width)
    return [name, ", ".join(f"{k} {n}" for k, n in sources.items()), inside, median(widths)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--level", type=float, default=0.99)
    parser.add_argument("--n", type=int, default=256, help="draws of the proposal")
    parser.add_argument("--m", type=int, default=64, help="draws of the posterior")
    parser.add_argument("--sampled", nargs="+", choices=list(BY_NAME), metavar="TARGET")
    parser.add_argument("--verdicts", nargs="*", choices=list(BY_NAME), metavar="TARGET")
    parser.add_argument("--chained", type=int, default=10, help="of the runs, how many may run chains")
    parser.add_argument("--blind", action="store_true", help="the frozen model has lost the mode, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained("embedded")
    if args.verdicts is not None:
        verdicts.measure(lm, args)
        return
    if args.sampled:
        rows = []
        for name in args.sampled:
            rows.append(sampled(lm, name, args))
            print(rows[-1], flush=True)
        headers = ["target", "truth", f"inside, of {args.runs}", "median width, nats"]
        print(tabulate(rows, headers, "github", floatfmt=".3f"))
        return
    table = []
    for number, case in enumerate(CASES):
        problem = Problem.of(case, lm)
        truth, prompted = problem.truth, np.exp(problem.log_q)
        for name, q in (("prompted", prompted), ("half-trained", (prompted + truth.p) / 2)):
            with np.errstate(divide="ignore"):
                log_w = log_weights(np.log(q), truth.log_r)
            found = intervals(q, log_w, truth.p, args, number)
            inside = sum(truth.log_z in i for i in found)
            caught = sum(truth.log_z - BIAS not in i for i in found)
            table.append([case.name, name, inside, median(i.width for i in found), caught])
            print(table[-1], flush=True)
    headers = ["target", "proposal", f"inside, of {args.runs}", "median width, nats", "biased: outside"]
    print(tabulate(table, headers, "github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
