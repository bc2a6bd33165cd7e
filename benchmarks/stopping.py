"""Does `stop_at_gap` save updates? A fixed schedule against one that stops at a gap, with exact distances.

    python -m benchmarks.stopping
    python -m benchmarks.stopping --schedule constant

Two of the posteriors of `benchmarks/posteriors`: one small enough for the trainer to enumerate (the gap is exact), and
one that it must hold against draws of the posterior (the gap is the upper end of an interval). With a falling learning
rate the last updates of the schedule take out noise that no gap is about; at a constant one both end under the same.
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import mean

from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import LanguageModel
from amortlm.inference.exact import distance, enumerate_posterior, policy_log_probs

from .posteriors.cases import BY_NAME, ROW
from .posteriors.methods import trainer_of

TARGETS = ("infill-long", "tempered-0.5")


def run(
    lm: LanguageModel, name: str, updates: int, schedule: str, mark: float, seed: int
) -> tuple[int, float, float]:
    """(updates made, total variation, KL(q || p)) of one training; mark 0: the whole schedule."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            lm,
            BY_NAME[name],
            folder,
            objective="vargrad",
            max_steps=updates,
            num_samples=32,
            learning_rate=3e-3,
            lr_scheduler_type=schedule,
            diagnose_steps=10,
            stop_at_gap=mark,
            seed=seed,
        )
        trainer.train()
    policy = trainer.policy
    exact = enumerate_posterior(trainer.target, policy.support, ROW)
    found = distance(policy_log_probs(policy, ROW), exact.log_p)
    return trainer.state.global_step, found.total_variation, found.kl_qp


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument(
        "--schedule", default="linear", help="of the learning rate: linear (to 0) or constant"
    )
    parser.add_argument("--marks", type=float, nargs="+", default=[0.05, 0.01], help="nats")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained("embedded")
    table = []
    for name in args.targets:
        for mark in (*args.marks, 0.0):
            runs = [run(lm, name, args.updates, args.schedule, mark, seed) for seed in range(args.seeds)]
            steps = ", ".join(str(r[0]) for r in runs)
            rule = f"stop at {mark:g}" if mark else "fixed"
            table.append([name, rule, steps, mean(r[1] for r in runs), max(r[2] for r in runs)])
            print(table[-1], flush=True)
    headers = ["target", "rule", "updates", "TV, mean", "KL(q, p), largest"]
    print(tabulate(table, headers, "github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
