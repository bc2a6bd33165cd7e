"""One sampler q(z | x) for several tasks at once, or one per task?

Two posteriors of one model that share nothing but English: the missing sentence of a story, and the steps of a sum
with a calculator. The joint sampler sees both, mixed, for as many updates as the two others have together.

    python recipes/universal.py --output runs/universal
"""

from __future__ import annotations

from typing import Any

from _common import Metrics, Results, average, load_model, parser, train, untrained
from amortlm import LanguageModel, Posterior, Support
from amortlm.lab.tasks import arithmetic
from amortlm.lab.tasks.infilling import STORIES
from amortlm.types import Row

# A row brings its own prompt and the texts around z, so that both tasks are one target on one support.
PROMPT, OF, GIVEN = "{prompt}", "{z}{after}", "{before}"
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=25, tool="calculator")  # which stories never call
CONFIG: dict[str, Any] = {
    "objective": "vargrad",
    "num_samples": 8,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-3,
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


def measure(posterior: Posterior, name: str, rows: list[Row], samples: int, seed: int) -> Metrics:
    """Means over unseen rows; for sums also the share of right answers, by vote and of single samples."""
    found = [posterior.estimate(row, samples, seed=("measure", seed)) for row in rows]
    out = average(
        [{"ESS": e.ess, "ELBO": e.elbo, "log R": e.log_reward, "var log w": e.log_w_variance} for e in found]
    )
    if name == "sums":
        # The same policy; the target with the answer as a column of its own, which is what is voted on.
        answer = posterior.lm.log_prob(arithmetic.OF, given=GIVEN)
        votes = Posterior(posterior.policy, answer).vote(rows, 10, seed=("vote", seed))
        out["right by vote of 10"] = sum(v.best == r["y"] for v, r in zip(votes, rows, strict=True)) / len(
            rows
        )
        out["right, one sample"] = sum(
            v.counts.get(r["y"], 0) / v.n for v, r in zip(votes, rows, strict=True)
        ) / len(rows)
    return {f"{name}: {metric}": value for metric, value in out.items()}


class Tasks:
    """Training and unseen rows of both tasks; samplers trained on one of them, or on both."""

    def __init__(self, lm: LanguageModel, train_rows: int, test_rows: int):
        self.lm, self.target = lm, lm.log_prob(OF, given=GIVEN)
        both = dict(zip(NAMES, (f(train_rows + test_rows) for f in (story_rows, sum_rows)), strict=True))
        self.train = {name: rows[:train_rows] for name, rows in both.items()}
        self.test = {name: rows[train_rows:] for name, rows in both.items()}

    def trained(self, names: tuple[str, ...], steps: int, seed: int) -> Posterior:
        rows = [row for name in names for row in self.train[name]]
        gold = [[row["gold"].rstrip(".")] for row in rows]
        return train(
            self.lm,
            self.target,
            PROMPT,
            SUPPORT,
            rows,
            gold=gold,
            max_steps=steps * len(names),
            seed=seed,
            **CONFIG,
        )

    def figures(self, samplers: dict[str, Posterior], samples: int, seed: int) -> Metrics:
        parts = [measure(samplers[name], name, self.test[name], samples, seed) for name in NAMES]
        return {k: v for part in parts for k, v in part.items()}


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "universal", steps=75, seeds=3)
    options.add_argument("--rows", type=int, default=100, help="rows of each task to train on")
    options.add_argument("--test-rows", type=int, default=24, help="unseen rows of each task")
    options.add_argument("--samples", type=int, default=64, help="samples a row that are measured")
    args = options.parse_args(argv)
    tasks = Tasks(load_model(args.model), args.rows, args.test_rows)
    settings = {k: v for k, v in vars(args).items() if k not in ("seeds", "output")} | CONFIG
    results = Results(args.output, "One sampler for several tasks", settings)

    def start(seed: int) -> Metrics:
        raw = untrained(tasks.lm, tasks.target, PROMPT, SUPPORT)
        return tasks.figures(dict.fromkeys(NAMES, raw), args.samples, seed)

    def each(seed: int) -> Metrics:
        samplers = {name: tasks.trained((name,), args.steps, seed) for name in NAMES}
        return tasks.figures(samplers, args.samples, seed)

    def joint(seed: int) -> Metrics:
        both = tasks.trained(NAMES, args.steps, seed)
        return tasks.figures(dict.fromkeys(NAMES, both), args.samples, seed)

    for seed in range(args.seeds):
        results.run("untrained", seed, lambda s=seed: start(s))
        results.run("one per task", seed, lambda s=seed: each(s))
        results.run("joint", seed, lambda s=seed: joint(s))
    results.finish(
        f"{args.rows} rows of each task to train on, {args.test_rows} unseen ones measured with {args.samples} "
        f"samples each; {args.steps} updates of each single sampler, {2 * args.steps} of the joint one, so that the "
        "sum of updates is equal, though the joint sampler has half the adapter weights. Nats; ± between seeds."
    )


if __name__ == "__main__":
    main()
