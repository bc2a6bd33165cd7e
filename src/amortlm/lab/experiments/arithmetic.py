"""Arithmetic with a calculator (Hu et al. 2024, section 4.4): accuracy on 3, 4 and, never trained on, 5 operands.

Every method has the calculator, and answers by a vote of ten samples at temperature 0.1. SFT sees 50 questions with
steps; GFlowNet, PPO and GRPO start from that SFT and see questions with answers besides, no more steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from amortlm.errors import DataError, PromptTooLongError
from amortlm.lab.baselines.ppo import PPOConfig
from amortlm.lab.compare import line_figure, paired_digest, paired_table
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Results, Runs, Settings, Trained
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.arithmetic import OF, PROMPT, questions, read_questions
from amortlm.lab.training import (
    Problem,
    from_supervised,
    train_gflownet,
    train_reinforced,
    train_supervised,
    untrained,
)
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.train import GFNConfig
from amortlm.types import Row

OPERANDS = (3, 4, 5)
SHOTS = (0, 3, 5, 10, 20)
METRICS = {f"accuracy_{n}": f"{n} operands" for n in OPERANDS} | {"single_5": "5 operands, one sample"}
FILES = {3: "1digit_3_op+-_test.json", 4: "1digit_4_op+-_test.json", 5: "1digit_5_op+-_test.json"}


@dataclass(frozen=True)
class Questions:
    """Rows with x, y and steps z. shown: those whose steps may be used; test: by number of operands."""

    shown: list[Row]
    asked: list[Row]
    test: dict[int, list[Row]]


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Questions:
    """The paper's questions from the folder --data, or generated ones. Raises DataError."""
    counts = (settings["with_steps"], settings["questions"], settings["test_questions"])
    if data is None:
        test = {n: questions(counts[2], [n], ("test", n)) for n in OPERANDS}
        known = {row["x"] for rows in test.values() for row in rows}
        wanted = counts[0] + counts[1]
        train = [row for row in questions(2 * wanted, [3, 4], "train") if row["x"] not in known]
        shown, asked = train[: counts[0]], train[counts[0] : wanted]
    else:
        folder = data / "with_tool" if (data / "with_tool").is_dir() else data
        shown = read_questions(folder / "1digit_34_op+-_train_50.json")[: counts[0]]
        asked = read_questions(folder / "1digit_34_op+-_hw.json")[: counts[1]]
        test = {n: read_questions(folder / name)[: counts[2]] for n, name in FILES.items()}
    found = (len(shown), len(asked), min(map(len, test.values())))
    if found != counts:
        raise DataError(
            f"{data or 'generator'}: {found} questions with steps, without, and to test; asked for {counts}"
        )
    return Questions(shown, asked, test)


def problem_of(context: Context, prompt: str = PROMPT) -> Problem:
    """Questions with their results; of the first ones the steps are known."""
    rows = [{"x": row["x"], "y": row["y"]} for row in [*context.data.shown, *context.data.asked]]
    gold = [[row["z"]] for row in context.data.shown] + [[] for _ in context.data.asked]
    target = context.lm.log_prob(OF, given=prompt)
    return Problem(target, prompt, Support(**context.settings["support"]), rows, gold)


def with_steps(context: Context) -> Problem:
    shown = context.data.shown
    return replace(problem_of(context), rows=shown, gold=[[row["z"]] for row in shown])


def few_shot(context: Context, k: int) -> Trained:
    """The untrained model after k solved questions, other ones for every seed."""
    shown = context.data.shown
    chosen = [shown[(context.seed * k + i) % len(shown)] for i in range(k)]
    solved = [PROMPT.format(**row) + OF.replace("{z}", "{z}.").format(**row) for row in chosen]
    prompt = context.settings["shots_separator"].join([*solved, PROMPT])
    trained = untrained(context, problem_of(context, prompt))
    try:
        trained.sampler.policy.encode_rows(context.data.test[5])
    except PromptTooLongError:
        return Trained(None)  # `evaluate` reports it without figures
    return trained


def sft(context: Context) -> Trained:
    return train_supervised(context, with_steps(context), context.settings["sft"])


def reinforced(context: Context, method: str) -> Trained:
    """Reward: log p(z y | x), as for the GFlowNet; the KL penalty holds the policy near the SFT it starts from."""
    policy = sft(context).sampler.policy
    return train_reinforced(context, problem_of(context), method, context.settings[method], policy=policy)


def gflownet(context: Context) -> Trained:
    """From SFT, with the 50 written chains in the replay buffer."""
    start = from_supervised(context, with_steps(context), context.settings["sft"])
    config = context.settings["gflownet"]
    return train_gflownet(context, problem_of(context), config, "gflownet", start=start)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Accuracy by number of operands; details: samples of five questions; records: which questions were right."""
    settings, seed, posterior = context.settings, context.seed, trained.sampler
    if posterior is None:
        note = "the examples do not fit the model's context"
        return Outcome(dict.fromkeys(METRICS, math.nan), {"note": note})
    n, heat = settings["votes"], settings["vote_temperature"]
    right = {}
    for operands, rows in context.data.test.items():
        votes = posterior.vote(rows, n, temperature=heat, seed=("evaluate", seed))
        right[f"accuracy_{operands}"] = [
            float(v.best == row["y"]) for v, row in zip(votes, rows, strict=True)
        ]
    hardest = context.data.test[5]
    right["single_5"] = single(posterior, hardest, n, seed)
    metrics = {name: sum(values) / len(values) for name, values in right.items()}
    examples = [
        {"x": row["x"], "y": row["y"], "samples": [s.text for s in posterior.sample(row, 3, seed=seed)]}
        for row in hardest[:5]
    ]
    return Outcome(metrics, {"examples": examples}, right)


def single(posterior: Posterior, rows: list[Row], n: int, seed: int) -> list[float]:
    """Share of n samples at temperature 1 that lead to the right answer, for each question."""
    votes = posterior.vote(rows, n, seed=("single", seed))
    return [v.counts.get(str(row["y"]), 0) / v.n for v, row in zip(votes, rows, strict=True)]


def digest(runs: Runs) -> dict[str, Any]:
    return {
        "paired": paired_digest(
            runs, [("gflownet", baseline) for baseline in ("sft", "ppo", "grpo")], METRICS
        )
    }


def summary(results: Results) -> str:
    """Paired tests on the test questions: each question's mean over seeds."""
    notes = [
        f"{method}: {runs[0]['details']['note']}."
        for method, runs in results["runs"].items()
        if "note" in runs[0]["details"]
    ]
    return "\n\n".join([*notes, paired_table(results["digest"]["paired"], METRICS, "questions")])


def figures(results: Results, folder: Path) -> list[str]:
    """Accuracy against the number of operands."""
    names = {n: f"accuracy_{n}" for n in OPERANDS}
    lines = {
        method: {n: found[name] for n, name in names.items()} for method, found in results["summary"].items()
    }
    return line_figure(lines, "operands (5: never trained on)", "accuracy", folder / "accuracy.png")


EXPERIMENT = Experiment(
    name="arithmetic",
    question="From 50 worked sums and a thousand with the result alone, how well does each method solve sums of 3 and "
    "4 operands, and of 5, which it never saw?",
    presets=read_presets("arithmetic"),
    groups={"gflownet": GFNConfig, "ppo": PPOConfig},
    prepare=prepare,
    reads_data=True,
    methods={
        **{f"{k}-shot": partial(few_shot, k=k) for k in SHOTS},
        "sft": sft,
        **{name: partial(reinforced, method=name) for name in ("ppo", "grpo")},
        "gflownet": gflownet,
    },
    evaluate=evaluate,
    metrics={
        **{
            f"accuracy_{n}": Metric(f"{n} operands", ".1%", "higher", f"accuracy of the vote on {n} operands")
            for n in OPERANDS
        },
        "single_5": Metric(
            "5, one sample", ".1%", "higher", "accuracy of single samples at temperature 1, 5 operands"
        ),
    },
    digest=digest,
    figures=figures,
    summary=summary,
    paper={
        "k-shot, best k": {"accuracy_3": "35.5%", "accuracy_4": "21.0%", "accuracy_5": "10.5%"},
        "SFT": {"accuracy_3": "72.1%", "accuracy_4": "19.6%", "accuracy_5": "12.8%"},
        "PPO": {"accuracy_3": "30.6%", "accuracy_4": "13.7%", "accuracy_5": "5.6%"},
        "GFlowNet": {"accuracy_3": "95.2%", "accuracy_4": "75.4%", "accuracy_5": "40.7%"},
    },
    paper_setting="instruction-tuned GPT-J 6B",
)
