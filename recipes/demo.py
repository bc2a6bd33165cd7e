"""Train two posteriors on the embedded model and show what changed: `make demo`.

numbers    "a random integer drawn uniformly between 0 and 100": the exact posterior is known
infilling  the missing fourth sentence of a five-sentence story: known up to log Z

    python recipes/demo.py --output runs/demo
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from amortlm import GFNTrainer, Posterior, __version__, importance
from amortlm.diagnostics.diversity import diversity
from amortlm.lab.tasks import infilling, numbers
from amortlm.types import Row
from demo_figure import InfillingData, NumbersData, demo_figure

SAMPLES = 256  # per story; with fewer, a bad sampler looks better than it is
CURVE_STORIES = 4  # stories behind each point of the training curves
EXAMPLES = 4
SHOWN = ("log R", "ESS", "ELBO", "log-weight variance", "distinct", "edit distance")


class Every(TrainerCallback):
    """Call `measure` now and every so many updates, and keep (step, value)."""

    def __init__(self, steps: int, measure: Any):
        self.steps, self.measure, self.history = steps, measure, [(0, measure())]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.history.append((state.global_step, self.measure()))


def run_numbers(folder: Path) -> tuple[NumbersData, dict[str, Any]]:
    """Train the random-integer task; figures are exact, by summing q over the 101 integers."""
    trainer = numbers.SPEC.trainer(str(folder))
    track = Every(20, lambda: numbers.exactness(trainer.posterior))
    seconds = _train(trainer, track, "numbers")
    _save_rows(folder, numbers.SPEC.rows())
    steps, states = zip(*track.history, strict=True)
    before, after = states[0], states[-1]
    table = [
        ["valid integers", f"{before.valid:.2%}", f"{after.valid:.2%}"],
        ["KL to uniform (nats)", f"{before.kl:.4f}", f"{after.kl:.4f}"],
        ["TV to uniform", f"{before.total_variation:.4f}", f"{after.total_variation:.4f}"],
    ]
    print(tabulate(table, headers=["exact", "before", "after"], disable_numparse=True))
    print(f"for comparison: {numbers.PAPER}\n")
    data = NumbersData(
        before=before.probs,
        after=after.probs,
        kl_before=before.kl,
        kl_after=after.kl,
        valid_before=before.valid,
        valid_after=after.valid,
        steps=steps,
        curve=[state.kl for state in states],
        curve_label="KL to uniform (nats)",
    )
    return data, {"before": vars(before), "after": vars(after), "seconds": seconds}


def run_infilling(folder: Path) -> tuple[InfillingData, dict[str, Any]]:
    """Train story infilling; figures are importance estimates, means over stories."""
    rows, unseen = infilling.SPEC.rows(), infilling.UNSEEN
    trainer = infilling.SPEC.trainer(str(folder))
    posterior = trainer.posterior
    before, before_unseen = _measure(posterior, rows), _measure(posterior, unseen)
    before_stories = _stories(posterior, rows)
    track = Every(20, lambda: _curve_point(posterior, rows))
    seconds = _train(trainer, track, "infilling")
    after, after_unseen = _measure(posterior, rows), _measure(posterior, unseen)
    after_stories = _stories(posterior, rows)
    table = [[n, before[n], after[n], before_unseen[n], after_unseen[n]] for n in SHOWN]
    groups = [f"{len(rows)} stories, before", "after", f"{len(unseen)} others, before", "after"]
    print(tabulate(table, headers=["mean over", *groups], floatfmt=".3f"))
    _print_stories(rows, before_stories, after_stories)
    _save_rows(folder, rows)
    steps, points = zip(*track.history, strict=True)
    data = InfillingData(
        log_w_before=before["log_w"],
        log_w_after=after["log_w"],
        steps=steps,
        ess=[ess for ess, _ in points],
        log_w_variance=[variance for _, variance in points],
        metrics={name: (before[name], after[name]) for name in SHOWN},
    )
    stories = {"before": before_stories, "after": after_stories}
    unseen_results = {"before": before_unseen, "after": after_unseen}
    results = {"before": before, "after": after, "unseen": unseen_results, "stories": stories}
    return data, {**results, "seconds": seconds}


def _save_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Save rows where `amortlm sample` and `amortlm evaluate` look for them if none are given."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train(trainer: GFNTrainer, track: Every, name: str) -> float:
    print(f"training {name}: {trainer.args.max_steps} updates", flush=True)
    trainer.add_callback(track)
    start = time.perf_counter()
    trainer.train(overwrite_output_dir=True)
    return time.perf_counter() - start


def _measure(posterior: Posterior, rows: list[Any]) -> dict[str, Any]:
    """Mean figures over rows, and the log importance weights of each row."""
    log_w, figures = [], []
    for row in rows:
        samples = posterior.sample(row, SAMPLES)
        log_reward = torch.tensor([s.log_reward for s in samples])
        log_w.append(log_reward - torch.tensor([s.log_q for s in samples]))
        estimate = importance.estimate(log_w[-1], log_reward)
        spread = diversity([s.tokens for s in samples])
        figures.append(
            {
                "log R": estimate.log_reward,
                "ESS": estimate.ess,
                "ELBO": estimate.elbo,
                "log-weight variance": estimate.log_w_variance,
                "distinct": spread.distinct,
                "edit distance": spread.edit_distance,
            }
        )
    means = {name: sum(f[name] for f in figures) / len(figures) for name in SHOWN}
    return {**means, "log_w": [w.tolist() for w in log_w]}


def _curve_point(posterior: Posterior, rows: list[Any]) -> tuple[float, float]:
    estimates = [posterior.estimate(row, SAMPLES // 2) for row in rows[:CURVE_STORIES]]
    n = len(estimates)
    return sum(e.ess for e in estimates) / n, sum(e.log_w_variance for e in estimates) / n


def _stories(posterior: Posterior, rows: list[Any]) -> list[str]:
    """The first sample for each of the first rows: unedited, seeds fixed."""
    return [posterior.sample(row, 1)[0].text for row in rows[:EXAMPLES]]


def _print_stories(rows: list[Any], before: list[str], after: list[str]) -> None:
    for row, old, new in zip(rows, before, after, strict=False):
        print()
        parts = [("", row["x"]), ("  before: ", old), ("  after:  ", new), ("", row["y"])]
        for label, text in parts:
            print(textwrap.fill(label + text.strip(), 100, subsequent_indent=" " * len(label)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    output: Path = parser.parse_args().output
    hf_logging.disable_progress_bar()
    number_data, number_results = run_numbers(output / "numbers")
    infilling_data, infilling_results = run_infilling(output / "infilling")
    demo_figure(number_data, infilling_data, output / "demo.png")
    results = {"version": __version__, "numbers": number_results, "infilling": infilling_results}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"picture         {output / 'demo.png'}")
    print(f"figures         {output / 'results.json'}")
    print(f"posteriors      {output / 'numbers'}, {output / 'infilling'}")
    print(f"try next        amortlm sample {output / 'infilling'} -n 5")


if __name__ == "__main__":
    main()
