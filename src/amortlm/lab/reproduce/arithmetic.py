"""Arithmetic with a calculator (Hu et al. 2024, section 4.4): accuracy on 3, 4 and, never trained on, 5 operands.

Every method has the calculator, and answers by a vote of ten samples at temperature 0.1. SFT sees 50 questions with
steps; GFlowNet, PPO and GRPO start from that SFT and see questions with answers besides, no more steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amortlm.errors import DataError, PromptTooLongError
from amortlm.lab.reproduce.experiment import (
    Context,
    Experiment,
    Metric,
    Outcome,
    Settings,
    Trained,
    read_presets,
)
from amortlm.lab.reproduce.training import (
    new_policy,
    train_gflownet,
    train_reinforced,
    train_supervised,
    untrained,
)
from amortlm.lab.tasks.arithmetic import OF, PROMPT, questions, read_questions
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.types import Row

OPERANDS = (3, 4, 5)
SHOTS = (0, 3, 5, 10, 20)

FILES = {3: "1digit_3_op+-_test.json", 4: "1digit_4_op+-_test.json", 5: "1digit_5_op+-_test.json"}


@dataclass(frozen=True)
class Questions:
    """Rows with x, y and steps z. shown: those whose steps may be used; test: by number of operands."""

    shown: list[Row]
    asked: list[Row]
    test: dict[int, list[Row]]


def prepare(settings: Settings, model: str | None, data: Path | None, dry_run: bool) -> Context:
    """Model and questions: the paper's from the folder --data, or generated ones. Raises DataError, ConfigError."""
    lm = LanguageModel.from_pretrained(model or settings["model"])
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
    return Context(settings, lm, Questions(shown, asked, test), dry_run)


def target_of(context: Context, prompt: str = PROMPT) -> Target:
    return context.lm.log_prob(OF, given=prompt)


def support_of(context: Context) -> Support:
    return Support(**context.settings["support"])


def few_shot(k: int) -> Callable[[Context, int, Path], Trained]:
    """The untrained model after k solved questions, other ones for every seed."""

    def build(context: Context, seed: int, folder: Path) -> Trained:
        shown = context.data.shown
        chosen = [shown[(seed * k + i) % len(shown)] for i in range(k)]
        solved = [PROMPT.format(**row) + OF.replace("{z}", "{z}.").format(**row) for row in chosen]
        prompt = context.settings["shots_separator"].join([*solved, PROMPT])
        trained = untrained(context, target_of(context, prompt), prompt, support_of(context))
        try:
            trained.sampler.policy.encode_rows(context.data.test[5])
        except PromptTooLongError:
            return Trained(None)  # `evaluate` reports it without figures
        return trained

    return build


def start(context: Context, seed: int) -> Policy:
    return new_policy(context, PROMPT, support_of(context), lora=context.settings["lora"], seed=seed)


def sft(context: Context, seed: int, folder: Path) -> Trained:
    rows = context.data.shown
    return train_supervised(
        context,
        start(context, seed),
        target_of(context),
        rows=rows,
        gold=[[row["z"]] for row in rows],
        folder=folder / "sft",
        seed=seed,
        **context.settings["sft"],
    )


def training_rows(context: Context) -> list[Row]:
    return [{"x": row["x"], "y": row["y"]} for row in [*context.data.shown, *context.data.asked]]


def reinforced(method: str) -> Callable[[Context, int, Path], Trained]:
    """Reward: log p(z y | x), as for the GFlowNet; the KL penalty holds the policy near the SFT it starts from."""

    def train(context: Context, seed: int, folder: Path) -> Trained:
        target = target_of(context)
        return train_reinforced(
            context,
            sft(context, seed, folder).sampler.policy,
            target,
            method=method,
            reward=target.score_final,
            rows=training_rows(context),
            folder=folder,
            seed=seed,
            **context.settings[method],
        )

    return train


def gflownet(context: Context, seed: int, folder: Path) -> Trained:
    """From SFT, with the 50 written chains in the replay buffer."""
    begin = folder / "start"
    if not (begin / "posterior.json").exists():
        sft(context, seed, folder).sampler.save_pretrained(begin)
    shown, asked = context.data.shown, context.data.asked
    return train_gflownet(
        context,
        target=target_of(context),
        prompt=PROMPT,
        support=support_of(context),
        rows=training_rows(context),
        config=context.settings["gflownet"],
        folder=folder / "gflownet",
        seed=seed,
        adapter=begin,
        gold=[[row["z"]] for row in shown] + [[] for _ in asked],
    )


def evaluate(context: Context, trained: Trained, seed: int) -> Outcome:
    """Accuracy by number of operands; details: which questions were right."""
    settings, posterior = context.settings, trained.sampler
    if posterior is None:
        nothing = dict.fromkeys([f"accuracy_{n}" for n in OPERANDS] + ["single_5"], math.nan)
        return Outcome(nothing, {"note": "the examples do not fit the model's context"})
    metrics, right = {}, {}
    for n, rows in context.data.test.items():
        votes = posterior.vote(
            rows,
            settings["votes"],
            temperature=settings["vote_temperature"],
            seed=("evaluate", seed),
        )
        right[f"accuracy_{n}"] = [float(v.best == row["y"]) for v, row in zip(votes, rows, strict=True)]
    right["single_5"] = single(posterior, context.data.test[5], settings["votes"], seed)
    metrics = {name: sum(values) / len(values) for name, values in right.items()}
    examples = [
        {"x": row["x"], "y": row["y"], "samples": [s.text for s in posterior.sample(row, 3, seed=seed)]}
        for row in context.data.test[5][:5]
    ]
    return Outcome(metrics, {"per_example": right, "examples": examples})


def single(posterior: Posterior, rows: list[Row], n: int, seed: int) -> list[float]:
    """Share of n samples at temperature 1 that lead to the right answer, for each question."""
    votes = posterior.vote(rows, n, seed=("single", seed))
    return [v.counts.get(str(row["y"]), 0) / v.n for v, row in zip(votes, rows, strict=True)]


def summary(results: dict[str, Any]) -> str:
    """Paired tests on the test questions: each question's mean over seeds."""
    from amortlm.lab.reproduce.compare import paired_table

    metrics = {f"accuracy_{n}": f"{n} operands" for n in OPERANDS} | {"single_5": "5 operands, one sample"}
    notes = [
        f"{method}: {runs[0]['details']['note']}."
        for method, runs in results["runs"].items()
        if "note" in runs[0]["details"]
    ]
    pairs = [("gflownet", baseline) for baseline in ("sft", "ppo", "grpo")]
    table = paired_table(results, pairs=pairs, metrics=metrics, unit="questions")
    return "\n\n".join([*notes, table])


def figures(results: dict[str, Any], folder: Path) -> list[str]:
    """Accuracy against the number of operands."""
    from amortlm.lab.reproduce.compare import line_figure

    series: dict[str, dict[float, tuple[float, float]]] = {}
    for method, found in results["summary"].items():
        values = {n: found[f"accuracy_{n}"] for n in OPERANDS}
        if all(v["mean"] is not None for v in values.values()):
            series[method] = {float(n): (v["mean"], v["sd"] or 0.0) for n, v in values.items()}
    return [line_figure(series, "operands (5: never trained on)", "accuracy", folder / "accuracy.png")]


EXPERIMENT = Experiment(
    name="arithmetic",
    question="From 50 worked sums and a thousand with the result alone, how well does each method solve sums of 3 and "
    "4 operands, and of 5, which it never saw?",
    presets=read_presets("arithmetic"),
    prepare=prepare,
    methods={
        **{f"{k}-shot": few_shot(k) for k in SHOTS},
        "sft": sft,
        "ppo": reinforced("ppo"),
        "grpo": reinforced("grpo"),
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
    figures=figures,
    summary=summary,
    paper={
        "k-shot, best k": {"accuracy_3": 0.355, "accuracy_4": 0.21, "accuracy_5": 0.105},
        "SFT": {"accuracy_3": 0.721, "accuracy_4": 0.196, "accuracy_5": 0.128},
        "PPO": {"accuracy_3": 0.306, "accuracy_4": 0.137, "accuracy_5": 0.056},
        "GFlowNet": {"accuracy_3": 0.952, "accuracy_4": 0.754, "accuracy_5": 0.407},
    },
    paper_setting="instruction-tuned GPT-J 6B",
)
