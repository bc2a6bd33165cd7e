"""Subjectivity of review sentences from few labels (Hu et al. 2024, section 4.4).

x is a sentence, y its label, z a short reason that nobody wrote: R(z) = p(z y | x). A label is predicted from the mean
of p(y | x z) over z, or directly from p(y | x) by the methods without a latent. The labelled sentences are the
first of the training split in an order that the seed shuffles, balanced between the labels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amortlm.em import EM, MStep
from amortlm.errors import DataError
from amortlm.lab.baselines.ppo import PPOConfig
from amortlm.lab.compare import line_figure, paired_digest, paired_table
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Results, Runs, Settings, Trained
from amortlm.lab.metrics.calibration import calibration
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.subjectivity import ANSWERS, OF, QUESTION, made_up, read_reviews
from amortlm.lab.training import (
    Problem,
    Split,
    config_of,
    train_gflownet,
    train_reinforced,
    train_supervised,
    untrained,
)
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.train import GFNConfig
from amortlm.types import Row

LABELS = (10, 20, 50)
BATCH = 64  # rows whose labels are scored at once


class Reviews(Split):
    """Rows with x (the sentence) and y (its label)."""

    def labelled(self, count: int, seed: int) -> list[Row]:
        """`count` training rows, half of each label."""
        order = random.Random(f"labels {seed}").sample(range(len(self.train)), len(self.train))
        halves = [[self.train[i] for i in order if self.train[i]["y"] == y][: count // 2] for y in ANSWERS]
        return [row for pair in zip(*halves, strict=True) for row in pair]


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Reviews:
    """Sentences: train.jsonl and test.jsonl with text and label_text in the folder --data; the smoke preset makes its
    own. Raises DataError."""
    wanted = settings["test_sentences"]
    if data is not None:
        train, test = (
            read_reviews(data / f"{part}.jsonl", settings["max_words"]) for part in ("train", "test")
        )
    elif settings["made_up"]:
        train, test = made_up(2 * max(LABELS)), made_up(wanted)
    else:
        raise DataError(
            "the experiment 'subjectivity' needs --data: a folder with train.jsonl and test.jsonl, whose lines have "
            "text and label_text; only the preset smoke makes its own sentences"
        )
    if len(test) < wanted or len(train) < max(LABELS):
        raise DataError(
            f"{data}: {len(train)} training and {len(test)} test sentences, but {max(LABELS)} and "
            f"test_sentences={wanted} are needed"
        )
    return Reviews(train, test[:wanted])


def problem_of(context: Context, labels: int = 0) -> Problem:
    """A reason z for the label of each of `labels` labelled sentences."""
    target, support = context.lm.log_prob(OF, given=QUESTION), Support(**context.settings["support"])
    return Problem(target, QUESTION, support, context.data.labelled(labels, context.seed))


def direct_problem(context: Context, prompt: str = QUESTION, labels: int = 0) -> Problem:
    """A label in place of a reason: z is the label itself."""
    longest = max(len(context.lm.encode_continuation(f" {a}")) for a in ANSWERS)
    support = Support(stop=".", min_tokens=1, max_tokens=longest)
    rows = context.data.labelled(labels, context.seed)
    gold = [[f" {row['y']}"] for row in rows]
    return Problem(context.lm.log_prob("{z}", given=QUESTION), prompt, support, rows, gold)


@dataclass(frozen=True)
class Direct:
    """p(y | x) without a latent: the label itself is what the policy writes."""

    policy: Policy

    def probabilities(self, rows: Sequence[Row], seed: object) -> list[list[float]]:
        """p of each answer, normalised among them, for each row; nothing is drawn."""
        out = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            rollouts = self.policy.rollouts(part, [[f" {a}" for a in ANSWERS]] * len(part))
            with torch.no_grad():
                log_q = self.policy.evaluate(rollouts).final(rollouts.lengths)
            out += log_q.view(len(part), len(ANSWERS)).double().softmax(1).tolist()
        return out


@dataclass(frozen=True)
class Latent:
    """p(y | x) as the mean of p(y | x z) over samples of z."""

    posterior: Posterior
    samples: int

    def probabilities(self, rows: Sequence[Row], seed: object) -> list[list[float]]:
        return [p.probs for p in self.posterior.predict(rows, ANSWERS, self.samples, seed=seed)]


def latent(context: Context, trained: Trained) -> Trained:
    return replace(trained, sampler=Latent(trained.sampler, context.settings["samples"]))


def zero_shot(context: Context) -> Trained:
    return Trained(Direct(direct_problem(context).policy(context)))


def zero_shot_latent(context: Context) -> Trained:
    return latent(context, untrained(context, problem_of(context)))


def few_shot(context: Context) -> Trained:
    """Labelled sentences in the prompt, the shortest of 50, so that they fit."""
    shots = sorted(context.data.labelled(max(LABELS), context.seed), key=lambda row: len(row["x"]))
    half = context.settings["shots"] // 2
    chosen = [row for a in ANSWERS for row in [r for r in shots if r["y"] == a][:half]]
    random.Random(context.seed).shuffle(chosen)
    shown = [f"{QUESTION} {{y}}.".format(**row).replace("{", "{{").replace("}", "}}") for row in chosen]
    prompt = context.settings["shots_separator"].join([*shown, QUESTION])
    return Trained(Direct(direct_problem(context, prompt).policy(context)))


def sft(context: Context, labels: int) -> Trained:
    trained = train_supervised(context, direct_problem(context, labels=labels), context.settings["sft"])
    return Trained(Direct(trained.sampler.policy))


def ppo(context: Context, labels: int) -> Trained:
    """Reward: log p(z y | x), as for the GFlowNet."""
    return latent(
        context, train_reinforced(context, problem_of(context, labels), "ppo", context.settings["ppo"])
    )


def gflownet(context: Context, labels: int) -> Trained:
    return latent(context, train_gflownet(context, problem_of(context, labels), context.settings["gflownet"]))


def gflownet_em(context: Context, labels: int) -> Trained:
    """The GFlowNet as E-step, then the M-step: p itself learns from z ~ q."""
    settings, problem = context.settings, problem_of(context, labels)
    args = config_of(context, settings["gflownet"])
    em = EM(
        context.lm,
        target=problem.target,
        prompt=problem.prompt,
        support=problem.support,
        train_dataset=problem.rows,
        args=args,
        m_step=MStep(**settings["m_step"]),
        rounds=settings["rounds"],
        adapter=settings["adapter"],
        p_adapter=settings["adapter"],
    )
    if context.dry_run:
        return Trained(None)
    updates = args.max_steps * args.per_device_train_batch_size * args.num_samples
    m = em.m_step
    evaluations = em.rounds * (updates + m.steps * m.batch_size * m.num_samples)
    return latent(context, Trained(em.run(), evaluations))


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Accuracy and calibration on the test sentences; details: the reliability diagram, and samples of five sentences;
    records: which were right."""
    rows = context.data.test
    probabilities = trained.sampler.probabilities(rows, context.seed)
    best = [max(range(len(ANSWERS)), key=p.__getitem__) for p in probabilities]
    right = [ANSWERS[i] == row["y"] for i, row in zip(best, rows, strict=True)]
    found = calibration([p[i] for p, i in zip(probabilities, best, strict=True)], right)
    details: dict[str, Any] = {"reliability": [asdict(b) for b in found.bins]}
    if isinstance(trained.sampler, Latent):
        draw = trained.sampler.posterior.sample
        details["examples"] = [
            {"x": row["x"], "y": row["y"], "samples": [s.text for s in draw(row, 4)]} for row in rows[:5]
        ]
    records = {"accuracy": [float(r) for r in right]}
    return Outcome({"accuracy": found.accuracy, "ece": found.ece}, details, records)


def digest(runs: Runs) -> dict[str, Any]:
    pairs = [(f"{family}-{n}", f"sft-{n}") for n in LABELS for family in ("gflownet-em", "gflownet")]
    return {"paired": paired_digest(runs, pairs, ["accuracy"])}


def summary(results: Results) -> str:
    """Paired tests on the test sentences (each sentence's mean over seeds), for each number of labels."""
    return paired_table(results["digest"]["paired"], {"accuracy": "accuracy"}, "sentences")


def figures(results: Results, folder: Path) -> list[str]:
    """Accuracy against the number of labels."""
    found = {method: of["accuracy"] for method, of in results["summary"].items()}
    lines = {
        family: {n: found[f"{family}-{n}"] for n in LABELS if f"{family}-{n}" in found} for family in FAMILIES
    }
    lines |= {name: dict.fromkeys(LABELS, found[name]) for name in ZERO if name in found}
    return line_figure(lines, "labelled sentences", "test accuracy", folder / "accuracy.png")


ZERO = {"zero-shot": zero_shot, "zero-shot-latent": zero_shot_latent, "few-shot": few_shot}
FAMILIES = {"sft": sft, "ppo": ppo, "gflownet": gflownet, "gflownet-em": gflownet_em}
EXPERIMENT = Experiment(
    name="subjectivity",
    question="From 10, 20 or 50 labels and no written reasons, how well does each method tell subjective sentences "
    "from objective ones, and how far can its confidence be trusted?",
    presets=read_presets("subjectivity"),
    groups={"gflownet": GFNConfig, "ppo": PPOConfig, "m_step": MStep},
    prepare=prepare,
    reads_data=True,
    methods={
        **ZERO,
        **{f"{family}-{n}": partial(method, labels=n) for n in LABELS for family, method in FAMILIES.items()},
    },
    evaluate=evaluate,
    digest=digest,
    metrics={
        "accuracy": Metric("accuracy", ".1%", "higher", "share of right labels on the test sentences"),
        "ece": Metric("ECE", ".3f", "lower", "expected calibration error of the predicted label, 10 bins"),
    },
    figures=figures,
    summary=summary,
    paper={},
    paper_setting="instruction-tuned GPT-J 6B: with 10 labels GFlowNet + M-step is 10.9 points above SFT",
)
