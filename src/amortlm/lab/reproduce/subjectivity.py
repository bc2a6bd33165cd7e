"""Subjectivity of review sentences from few labels (Hu et al. 2024, section 4.4).

x is a sentence, y its label, z a short reason that nobody wrote: R(z) = p(z y | x). A label is predicted from the mean
of p(y | x z) over z, or directly from p(y | x) by the methods without a latent. The labelled sentences are the
first of the training split in an order that the seed shuffles, balanced between the labels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amortlm.em import EM, MStep
from amortlm.errors import DataError
from amortlm.lab.reproduce.classifiers import Direct, Latent
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
from amortlm.lab.tasks.subjectivity import ANSWERS, OF, QUESTION, made_up, read_reviews
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.train import GFNConfig
from amortlm.types import Row

LABELS = (10, 20, 50)


@dataclass(frozen=True)
class Reviews:
    """Rows with x (the sentence) and y (its label)."""

    train: list[Row]
    test: list[Row]

    def labelled(self, count: int, seed: int) -> list[Row]:
        """`count` training rows, half of each label."""
        order = random.Random(f"labels {seed}").sample(range(len(self.train)), len(self.train))
        halves = [[self.train[i] for i in order if self.train[i]["y"] == y][: count // 2] for y in ANSWERS]
        return [row for pair in zip(*halves, strict=True) for row in pair]


def prepare(settings: Settings, model: str | None, data: Path | None, dry_run: bool) -> Context:
    """Model and sentences: train.jsonl and test.jsonl with text and label_text in the folder --data; the smoke
    preset makes its own. Raises DataError, ConfigError."""
    lm = LanguageModel.from_pretrained(model or settings["model"])
    folder = data or (Path(settings["data"]) if settings["data"] else None)
    if folder is None:
        reviews = Reviews(made_up(2 * max(LABELS)), made_up(settings["test_sentences"]))
    else:
        words = settings["max_words"]
        reviews = Reviews(
            read_reviews(folder / "train.jsonl", words), read_reviews(folder / "test.jsonl", words)
        )
    wanted = settings["test_sentences"]
    if len(reviews.test) < wanted or len(reviews.train) < max(LABELS):
        raise DataError(
            f"{folder}: {len(reviews.test)} test sentences; test_sentences={wanted} are asked for"
        )
    return Context(settings, lm, Reviews(reviews.train, reviews.test[:wanted]), dry_run)


def target_of(context: Context) -> Target:
    return context.lm.log_prob(OF, given=QUESTION)


def support_of(context: Context) -> Support:
    return Support(**context.settings["support"])


def direct_policy(context: Context, prompt: str, seed: int) -> Policy:
    longest = max(len(context.lm.encode_continuation(f" {a}")) for a in ANSWERS)
    support = Support(stop=".", min_tokens=1, max_tokens=longest)
    return new_policy(context, prompt, support, lora=context.settings["lora"], seed=seed)


def zero_shot(context: Context, seed: int, folder: Path) -> Trained:
    return Trained(Direct(direct_policy(context, QUESTION, seed)))


def zero_shot_latent(context: Context, seed: int, folder: Path) -> Trained:
    base = untrained(context, target_of(context), QUESTION, support_of(context))
    return Trained(Latent(base.sampler, context.settings["samples"]))


def few_shot(context: Context, seed: int, folder: Path) -> Trained:
    """Labelled sentences in the prompt, the shortest of 50, so that they fit."""
    shots = sorted(context.data.labelled(max(LABELS), seed), key=lambda row: len(row["x"]))
    chosen = [
        row for a in ANSWERS for row in [r for r in shots if r["y"] == a][: context.settings["shots"] // 2]
    ]
    random.Random(seed).shuffle(chosen)
    shown = [f"{QUESTION} {{y}}.".format(**row) for row in chosen]
    text = context.settings["shots_separator"].join(s.replace("{", "{{").replace("}", "}}") for s in shown)
    return Trained(
        Direct(direct_policy(context, text + context.settings["shots_separator"] + QUESTION, seed))
    )


def sft(labels: int) -> Callable[[Context, int, Path], Trained]:
    def train(context: Context, seed: int, folder: Path) -> Trained:
        rows = context.data.labelled(labels, seed)
        policy = direct_policy(context, QUESTION, seed)
        settings = context.settings["sft"]
        train_supervised(
            context,
            policy,
            context.lm.log_prob("{z}", given=QUESTION),
            rows=rows,
            gold=[[f" {row['y']}"] for row in rows],
            folder=folder,
            seed=seed,
            **settings,
        )
        return Trained(Direct(policy))

    return train


def ppo(labels: int) -> Callable[[Context, int, Path], Trained]:
    """Reward: log p(z y | x), as for the GFlowNet."""

    def train(context: Context, seed: int, folder: Path) -> Trained:
        target, settings = target_of(context), context.settings
        policy = new_policy(context, QUESTION, support_of(context), lora=settings["lora"], seed=seed)
        trained = train_reinforced(
            context,
            policy,
            target,
            method="ppo",
            reward=target.score_final,
            rows=context.data.labelled(labels, seed),
            folder=folder,
            seed=seed,
            **settings["ppo"],
        )
        return Trained(Latent(trained.sampler, settings["samples"]), trained.reward_evaluations)

    return train


def gflownet(labels: int) -> Callable[[Context, int, Path], Trained]:
    def train(context: Context, seed: int, folder: Path) -> Trained:
        settings = context.settings
        trained = train_gflownet(
            context,
            target=target_of(context),
            prompt=QUESTION,
            support=support_of(context),
            rows=context.data.labelled(labels, seed),
            config=settings["gflownet"],
            folder=folder,
            seed=seed,
            lora=settings["lora"],
        )
        return Trained(Latent(trained.sampler, settings["samples"]), trained.reward_evaluations)

    return train


def gflownet_em(labels: int) -> Callable[[Context, int, Path], Trained]:
    """The GFlowNet as E-step, then the M-step: p itself learns from z ~ q."""

    def train(context: Context, seed: int, folder: Path) -> Trained:
        settings = context.settings
        args = GFNConfig(
            **{"diagnose_steps": 0, **settings["gflownet"], "output_dir": str(folder), "seed": seed}
        )
        em = EM(
            context.lm,
            target=target_of(context),
            prompt=QUESTION,
            support=support_of(context),
            train_dataset=context.data.labelled(labels, seed),
            args=args,
            m_step=MStep(**settings["m_step"]),
            rounds=settings["rounds"],
            adapter=settings["lora"],
            p_adapter=settings["lora"],
        )
        if context.dry_run:
            return Trained(None)
        updates = args.max_steps * args.per_device_train_batch_size * args.num_samples
        m = em.m_step
        evaluations = em.rounds * (updates + m.steps * m.batch_size * m.num_samples)
        return Trained(Latent(em.run(), settings["samples"]), evaluations)

    return train


def evaluate(context: Context, trained: Trained, seed: int) -> Outcome:
    """Accuracy and calibration on the test sentences; details: which were right, and the reliability diagram."""
    from amortlm.lab.metrics.calibration import calibration

    rows = context.data.test
    probabilities = trained.sampler.probabilities(rows, seed)
    best = [max(range(len(ANSWERS)), key=p.__getitem__) for p in probabilities]
    right = [ANSWERS[i] == row["y"] for i, row in zip(best, rows, strict=True)]
    found = calibration([p[i] for p, i in zip(probabilities, best, strict=True)], right)
    details: dict[str, Any] = {
        "per_example": {"accuracy": [float(r) for r in right]},
        "reliability": [asdict(b) for b in found.bins],
    }
    if isinstance(trained.sampler, Latent):
        details["examples"] = [
            {
                "x": row["x"],
                "y": row["y"],
                "samples": [s.text for s in trained.sampler.posterior.sample(row, 4)],
            }
            for row in rows[:5]
        ]
    return Outcome({"accuracy": found.accuracy, "ece": found.ece}, details)


def summary(results: dict[str, Any]) -> str:
    """Paired tests on the test sentences (each sentence's mean over seeds), for each number of labels."""
    from amortlm.lab.reproduce.compare import paired_table

    pairs = [(f"{family}-{n}", f"sft-{n}") for n in LABELS for family in ("gflownet-em", "gflownet")]
    return paired_table(results, pairs=pairs, metrics={"accuracy": "accuracy"}, unit="sentences")


def figures(results: dict[str, Any], folder: Path) -> list[str]:
    """Accuracy against the number of labels."""
    from amortlm.lab.reproduce.compare import line_figure

    found = results["summary"]
    series: dict[str, dict[float, tuple[float, float]]] = {}
    for family in ("sft", "ppo", "gflownet", "gflownet-em"):
        points = {n: found[f"{family}-{n}"]["accuracy"] for n in LABELS if f"{family}-{n}" in found}
        if points:
            series[family] = {float(n): (v["mean"], v["sd"] or 0.0) for n, v in points.items()}
    for name in ("zero-shot", "zero-shot-latent", "few-shot"):
        if name in found:
            v = found[name]["accuracy"]
            series[name] = {float(n): (v["mean"], v["sd"] or 0.0) for n in LABELS}
    return [line_figure(series, "labelled sentences", "test accuracy", folder / "accuracy.png")]


FEW = {
    f"{family}-{n}": method(n)
    for n in LABELS
    for family, method in {"sft": sft, "ppo": ppo, "gflownet": gflownet, "gflownet-em": gflownet_em}.items()
}
EXPERIMENT = Experiment(
    name="subjectivity",
    question="From 10, 20 or 50 labels and no written reasons, how well does each method tell subjective sentences "
    "from objective ones, and how far can its confidence be trusted?",
    presets=read_presets("subjectivity"),
    prepare=prepare,
    methods={"zero-shot": zero_shot, "zero-shot-latent": zero_shot_latent, "few-shot": few_shot, **FEW},
    evaluate=evaluate,
    metrics={
        "accuracy": Metric("accuracy", ".1%", "higher", "share of right labels on the test sentences"),
        "ece": Metric("ECE", ".3f", "lower", "expected calibration error of the predicted label, 10 bins"),
    },
    figures=figures,
    summary=summary,
    paper={},
    paper_setting="instruction-tuned GPT-J 6B: with 10 labels GFlowNet + M-step is 10.9 points above SFT",
)
