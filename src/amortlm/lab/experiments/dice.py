"""Random numbers from a description: one q(z | description) for many distributions, log R(z) = the stated log
probability. Does it sample from descriptions that it was not trained on?

Every trained method gets the same number of completions: those that the target judges, or, for SFT, samples of the
stated distributions. In addition, the GFlowNet's buffer starts with a few outcomes of each description. All distances
are sums over the outcomes of a description, not estimates. Pass rates are those that benchmarks of random numbers
count; since q is known exactly, their draws are multinomial (`metrics/goodness.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from amortlm.errors import TrainingError
from amortlm.lab.baselines.ppo import PPOConfig
from amortlm.lab.baselines.resume import EVERY, LoopState
from amortlm.lab.compare import paired_digest, paired_table
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Results, Runs, Settings, Trained
from amortlm.lab.metrics.goodness import chi_square_pass_rate, ks_pass_rate
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.dice import FAMILIES, GROUPS, PATTERN, descriptions, distribution, log_prob
from amortlm.lab.training import Problem, train_gflownet, train_reinforced, untrained
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.targets.constraints import canonical, verifier
from amortlm.train import GFNConfig
from amortlm.types import Row

FLOOR = (
    -15.0
)  # nats: the reward of reinforcement learning for a text that is no outcome; `hard_penalty` of GFNConfig
KS_DRAWS, CHI_DRAWS = 100, 1000
PUBLISHED = (
    "Published pass rates of prompted models, which were **not trained for this**, on other descriptions than these: "
    "KS@100 of GPT-4o 23.9 %, of Nemotron-3 Super 120B 32.6 % (UnpredictaBench, arXiv 2606.06622; there the draws are "
    "compared with draws of the true distribution); of 11 models asked 1,000 times independently, 10 pass none of 15 "
    "named distributions (arXiv 2601.05414)."
)


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> tuple[Problem, dict[str, list[Row]]]:
    """The posterior with its training rows, and the rows of each test. The support holds every outcome of every
    description, in the model's own spelling. Raises DataError."""
    found = descriptions(settings["train_descriptions"], settings["test_descriptions"])
    rows = [*found.train, *(row for group in found.test.values() for row in group)]
    texts = {text for row in rows for text in distribution(row)}
    longest = max(len(lm.encode_continuation(text)) for text in texts)
    support = Support(stop=".", min_tokens=1, max_tokens=longest, pattern=PATTERN)
    return Problem(verifier(log_prob) + canonical(), "{prompt}", support, found.train), found.test


def without_training(context: Context) -> Trained:
    return untrained(context, context.data[0])


def sft(context: Context) -> Trained:
    """Maximum likelihood of samples of the stated distributions: as many, in as many updates, as the GFlowNet judges.

    It is trained here, since prompts are encoded once for their samples and q is renormalised on the support, as for
    the other methods.
    """
    problem: Problem = context.data[0]
    policy = problem.policy(context)
    if not context.dry_run:
        fit_samples(policy, problem.rows, context.settings, context.seed, context.folder)
    return Trained(problem.posterior(context, policy))


def fit_samples(policy: Policy, rows: Sequence[Row], settings: Settings, seed: int, folder: Path) -> None:
    """Train `policy` in place with fresh samples in each step; schedule and clipping as for the GFlowNet. An
    interrupted run goes on from what it has left in `folder`.

    Raises TrainingError for a loss that is not finite."""
    from transformers import get_cosine_schedule_with_warmup

    weights = [p for p in policy.parameters() if p.requires_grad]
    steps, defaults = settings["steps"], GFNConfig
    optimizer = torch.optim.AdamW(weights, lr=settings["sft"]["learning_rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(defaults.warmup_steps), steps)
    state = LoopState(folder, optimizer, schedule)
    done, _ = state.restore()
    for step in tqdm(range(done, steps), disable=None, desc="sft"):
        rng = random.Random(repr(("dice", "sft", seed, step)))
        batch = rng.sample(list(rows), settings["rows_per_step"])
        rollouts = policy.rollouts(
            batch, [stated_samples(row, settings["num_samples"], rng) for row in batch]
        )
        loss = -policy.evaluate(rollouts).final(rollouts.lengths).mean()
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss of SFT is {loss.item()} at step {step}: lower its learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0:
            state.save(step + 1)


def stated_samples(row: Row, count: int, rng: random.Random) -> list[str]:
    stated = distribution(row)
    return rng.choices(list(stated), [math.exp(v) for v in stated.values()], k=count)


def ppo(context: Context) -> Trained:
    """Reward: log R, at least FLOOR. With beta = 1 the optimum is R times the model's own distribution."""
    problem: Problem = context.data[0]
    target = problem.target.bind(context.lm)
    common = {"max_steps": "steps", "rows_per_step": "rows_per_step", "num_samples": "num_samples"}
    settings = {**{k: context.settings[v] for k, v in common.items()}, **context.settings["ppo"]}
    return train_reinforced(
        context,
        problem,
        "ppo",
        settings,
        reward=lambda rollouts: target.score_final(rollouts).clamp(min=FLOOR),
    )


def gflownet(context: Context, objective: str) -> Trained:
    """An objective on log R alone. The buffer starts with `gold` outcomes of each description, which count as judged.

    vargrad compares outcomes from the buffer with what q writes. forward_kl raises the outcomes of the buffer in
    proportion to R: maximum likelihood as in `sft`, but of draws that come from R."""
    settings = context.settings
    problem = replace(
        context.data[0], gold=[some_outcomes(r, settings["gold"]) for r in context.data[0].rows]
    )
    config = {
        "objective": objective,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["rows_per_step"],
        "num_samples": settings["num_samples"],
        "hard_penalty": -FLOOR,
        **settings["gflownet"],
        **settings[objective],
    }
    trained = train_gflownet(context, problem, config)
    judged = 0 if context.dry_run else sum(map(len, problem.gold or []))
    return replace(trained, reward_evaluations=trained.reward_evaluations + judged)


def some_outcomes(row: Row, count: int) -> list[str]:
    """Different outcomes of a description, each equally likely: what can be known without its probabilities."""
    outcomes = list(distribution(row))
    return random.Random(repr(("gold", row["prompt"]))).sample(outcomes, min(count, len(outcomes)))


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Means over the descriptions of each test; the seed draws the experiments of the pass rates.

    details: p and q of two descriptions of each test, and the mean TV of each family; records: every description."""
    records: dict[str, list[float]] = {}
    details: dict[str, Any] = {"examples": [], "tv": {}}
    for group, rows in context.data[1].items():
        shown = rows[:: len(rows) // 2 + 1][:2]
        for i, row in enumerate(rows):
            p, q = probabilities(trained.sampler, row)
            rng = np.random.default_rng([context.seed, list(GROUPS).index(group), i])
            found = compare(p, q, FAMILIES[row["family"]].numeric, context.settings["repeats"], rng)
            for name, value in found.items():
                records.setdefault(f"{name}_{group}", []).append(value)
            details["tv"].setdefault(f"{row['family']}, new {group}", []).append(found["tv"])
            if row in shown:
                outcomes = [text.strip() for text in distribution(row)]
                example = {"prompt": row["prompt"], "outcomes": outcomes, "p": p.tolist(), "q": q.tolist()}
                details["examples"].append({"group": group, **example})
    details["tv"] = {name: sum(values) / len(values) for name, values in details["tv"].items()}
    metrics = {name: mean(records.get(name, [])) for name in METRICS}
    return Outcome(metrics, details, records)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def probabilities(posterior: Posterior, row: Row) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """p and q [K] of the outcomes of a description, exact."""
    stated = distribution(row)
    log_q = posterior.log_prob(row, list(stated)).double()
    return np.exp(np.array(list(stated.values()))), log_q.exp().numpy()


def compare(
    p: np.ndarray[Any, Any], q: np.ndarray[Any, Any], numeric: bool, repeats: int, rng: np.random.Generator
) -> dict[str, float]:
    """Distances of q [K], and the rest of its mass, from p [K]; pass rates over `repeats` experiments. Raises
    DataError."""
    valid = float(q.sum())
    found = {
        "kl": float((p * (np.log(p) - np.log(np.maximum(q, 1e-300)))).sum()),
        "tv": float(0.5 * (np.abs(p - q).sum() + max(0.0, 1 - valid))),
        "valid": valid,
        "chi": chi_square_pass_rate(p, q, CHI_DRAWS, repeats, rng),
    }
    return {**found, "ks": ks_pass_rate(p, q, KS_DRAWS, repeats, rng)} if numeric else found


def digest(runs: Runs) -> dict[str, Any]:
    return {
        "paired": paired_digest(
            runs,
            [(a, b) for a in ("gflownet-vargrad", "gflownet-forward-kl") for b in ("sft", "ppo")],
            TESTED,
        )
    }


def summary(results: Results) -> str:
    tests = "\n".join(f"- new {name}: {meaning}" for name, meaning in GROUPS.items())
    labels = {name: METRICS[name].label for name in TESTED}
    paired = paired_table(results["digest"]["paired"], labels, "descriptions")
    return "\n\n".join(filter(None, [f"Tests:\n\n{tests}", paired, PUBLISHED]))


def figures(results: Results, folder: Path) -> list[str]:
    """Stated and sampled probabilities of two descriptions of each test. First seed of each method."""
    from amortlm.plots import GRID, INK, MUTED, SERIES_COLOURS, SMALL, TEXT, panels, save, style

    runs: dict[str, Any] = {method: found[0] for method, found in results["runs"].items()}
    examples = [run["details"]["examples"] for run in runs.values()]
    fig, axes = panels(len(examples[0]), 2, (6.0, 2.6))
    for i, ax in enumerate(axes):
        outcomes, p = examples[0][i]["outcomes"], examples[0][i]["p"]
        places = range(len(outcomes))
        ax.bar(places, p, width=1.0, color=MUTED, alpha=0.35, label="stated")
        for method, own, colour in zip(runs, examples, ("#999999", *SERIES_COLOURS), strict=False):
            ax.plot(places, own[i]["q"], label=method, color=colour, linewidth=1.4, marker=".", markersize=3)
        every = max(1, len(outcomes) // 6)
        ax.set_xticks(list(places)[::every], outcomes[::every])
        ax.set_ylim(0, 2 * max(p))
        prompt = examples[0][i]["prompt"]
        ax.set_title(
            f"new {examples[0][i]['group']}: {prompt[:60]}{'…' * (len(prompt) > 60)}",
            loc="left",
            fontsize=SMALL,
            color=INK,
        )
        style(ax)
    axes[0].legend(frameon=False, fontsize=SMALL, labelcolor=INK, edgecolor=GRID)
    fig.supylabel("probability", fontsize=TEXT, color=INK)
    return save(fig, folder / "distributions.png")


MEASURES = {
    "kl": Metric("KL(p‖q), nats", ".3f", "lower", "KL divergence from the stated distribution to q, exact"),
    "tv": Metric("TV(p, q)", ".3f", "lower", "total variation distance, exact"),
    "valid": Metric("valid", ".1%", "higher", "probability of an outcome that the description allows, exact"),
    "ks": Metric(
        "KS@100",
        ".1%",
        "higher",
        "share of experiments of 100 draws that a Kolmogorov-Smirnov test at 5 % does not reject, numeric families; "
        "a perfect sampler has 95 % or a little more",
    ),
    "chi": Metric(
        "chi-square",
        ".1%",
        "higher",
        "the same for 1,000 draws and a chi-square test, all families; an answer that is no outcome rejects",
    ),
}
METRICS = {
    f"{name}_{group}": Metric(
        f"{m.label}, new {group}", m.format, m.better, m.meaning if group == "parameters" else ""
    )
    for group in GROUPS
    for name, m in MEASURES.items()
}
TESTED = [f"{name}_{group}" for group in GROUPS for name in ("kl", "tv")]

EXPERIMENT = Experiment(
    name="dice",
    question="Told of a distribution in words, how near to it does each method bring a language model, on descriptions "
    "that it was not trained on, at equal numbers of completions?",
    presets=read_presets("dice"),
    groups={"ppo": PPOConfig, **dict.fromkeys(("gflownet", "vargrad", "forward_kl"), GFNConfig)},
    prepare=prepare,
    methods={
        "untrained": without_training,
        "sft": sft,
        "ppo": ppo,
        "gflownet-vargrad": partial(gflownet, objective="vargrad"),
        "gflownet-forward-kl": partial(gflownet, objective="forward_kl"),
    },
    evaluate=evaluate,
    once=frozenset({"untrained"}),
    metrics=METRICS,
    digest=digest,
    figures=figures,
    summary=summary,
    rows="metrics",
)
