"""One sampler q(z | x) for several tasks at once, or one per task?

Two unrelated posteriors of one model: the missing sentence of a story, and the steps of a sum with a calculator. The
joint sampler is trained on both, mixed, for as many updates as the two single samplers have together.

    python recipes/universal.py --output runs/universal
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _common import Figures, average, importance_figures, metrics
from amortlm import LanguageModel, Posterior, Support
from amortlm.lab import command
from amortlm.lab.experiment import Context, Experiment, Outcome, Results, Settings, Trained
from amortlm.lab.tasks import arithmetic
from amortlm.lab.tasks.infilling import STORIES
from amortlm.lab.training import Problem, train_gflownet, untrained
from amortlm.train import GFNConfig
from amortlm.types import Row

# A row brings its own prompt and the texts around z, so that both tasks are one target on one support.
PROMPT, OF, GIVEN = "{prompt}", "{z}{after}", "{before}"
SUPPORT = Support(
    stop=".", min_tokens=1, max_tokens=25, tool="calculator"
)  # stories never call the calculator
SETTINGS: Settings = {
    "model": "embedded",
    "steps": 75,  # of each single sampler
    "rows": 100,  # of each task to train on
    "test_rows": 24,  # unseen ones of each task
    "samples": 64,  # of each row that is measured
    "adapter": 16,
    "gflownet": {
        "objective": "vargrad",
        "num_samples": 8,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
    },
}
NAMES = ("stories", "sums")


def story_rows(count: int) -> list[Row]:
    return [
        {"prompt": f"{s['y']}</s><s>{s['x']}", "before": s["x"], "after": f" {s['y']}", "gold": s["gold"]}
        for s in STORIES[:count]
    ]


def sum_rows(count: int) -> list[Row]:
    """Three and four operands; the answer stands in `after`, never in the prompt."""
    rows = []
    for row in arithmetic.questions(count, [3, 4], "universal"):
        question = arithmetic.PROMPT.format(**row)
        after = arithmetic.OF.removeprefix("{z}").format(**row)
        rows.append({"prompt": question, "before": question, "after": after, "gold": row["z"], "y": row["y"]})
    return rows


@dataclass(frozen=True)
class Tasks:
    """The joint problem with the training rows of each task, and unseen rows."""

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]

    def problem(self, context: Context, *names: str) -> Problem:
        rows = [row for name in names for row in self.train[name]]
        gold = [[row["gold"].rstrip(".")] for row in rows]
        return Problem(context.lm.log_prob(OF, given=GIVEN), PROMPT, SUPPORT, rows, gold)


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Tasks:
    n = settings["rows"]
    rows = {"stories": story_rows(n + settings["test_rows"]), "sums": sum_rows(n + settings["test_rows"])}
    return Tasks({name: of[:n] for name, of in rows.items()}, {name: of[n:] for name, of in rows.items()})


def start(context: Context) -> Trained:
    return Trained(dict.fromkeys(NAMES, untrained(context, context.data.problem(context)).sampler))


def one_per_task(context: Context) -> Trained:
    parts = {name: _train(context, (name,), name) for name in NAMES}
    judged = sum(part.reward_evaluations for part in parts.values())
    return Trained({name: part.sampler for name, part in parts.items()}, judged)


def joint(context: Context) -> Trained:
    both = _train(context, NAMES)
    return Trained(dict.fromkeys(NAMES, both.sampler), both.reward_evaluations)


def _train(context: Context, names: tuple[str, ...], part: str = "") -> Trained:
    config = {"max_steps": context.settings["steps"] * len(names), **context.settings["gflownet"]}
    return train_gflownet(context, context.data.problem(context, *names), config, part)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Means over unseen rows; for sums also the share of right answers, by vote and of single samples."""
    out: Figures = {}
    for name, rows in context.data.test.items():
        posterior, n = trained.sampler[name], context.settings["samples"]
        found = [posterior.estimate(row, n, seed=("measure", context.seed)) for row in rows]
        figures = average([{**importance_figures(e), "log R": e.log_reward} for e in found])
        out |= {f"{name}: {metric}": value for metric, value in figures.items()}
    return Outcome(out | right_answers(trained.sampler["sums"], context.data.test["sums"], context.seed))


def right_answers(posterior: Posterior, rows: list[Row], seed: int) -> Figures:
    # The same policy, but the target has the answer in a column of its own, for the vote.
    answer = posterior.lm.log_prob(arithmetic.OF, given=GIVEN)
    votes = Posterior(posterior.policy, answer).vote(rows, 10, seed=("vote", seed))
    pairs = list(zip(votes, rows, strict=True))
    return {
        "sums: right by vote of 10": sum(v.best == row["y"] for v, row in pairs) / len(rows),
        "sums: right, one sample": sum(v.counts.get(row["y"], 0) / v.n for v, row in pairs) / len(rows),
    }


def notes(results: Results) -> str:
    s = results["settings"]
    return (
        f"{s['rows']} rows of each task to train on, {s['test_rows']} unseen ones measured with {s['samples']} samples "
        f"each; {s['steps']} updates of each single sampler, {2 * s['steps']} of the joint one, so that the sum of "
        "updates is equal, though the joint sampler has half the adapter weights. Nats; ± between seeds."
    )


EXPERIMENT = Experiment(
    name="universal",
    question="One sampler q(z | x) for several tasks at once, or one per task?",
    presets={"small": SETTINGS},
    groups={"gflownet": GFNConfig},
    prepare=prepare,
    methods={"untrained": start, "one per task": one_per_task, "joint": joint},
    evaluate=evaluate,
    metrics=metrics(
        *(f"{name}: {metric}" for name in NAMES for metric in ("ESS", "ELBO", "log R", "var log w")),
        "sums: right by vote of 10",
        "sums: right, one sample",
    ),
    rows="metrics",
    summary=notes,
)

if __name__ == "__main__":
    command.main(EXPERIMENT)
