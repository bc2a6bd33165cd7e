"""Continuations that are specific to their beginning: p(z | x)^a p(z)^b with b < 0.

A low temperature alone makes continuations likely, and the likeliest fit any story. Dividing by a power of p(z)
prefers continuations that x makes likelier: the pointwise mutual information log p(z | x) - log p(z) should rise. On a
support of 4,368 strings, where the posterior is known, the distance from it is exact.

    python recipes/contrastive.py --set a=1.5 --set b=-0.5 --output runs/contrastive
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path

import torch

from _common import Figures, average, metrics
from amortlm import LanguageModel, Posterior, Support, Target, exact, importance
from amortlm.diagnostics.diversity import distinct
from amortlm.errors import ConfigError
from amortlm.lab import command
from amortlm.lab.experiment import Context, Experiment, Outcome, Results, Settings, Trained
from amortlm.lab.tasks.infilling import STORIES
from amortlm.lab.training import Problem, train_gflownet, untrained
from amortlm.train import GFNConfig
from amortlm.types import Row

PROMPT = "{x}"
LONG = Support(stop=".", min_tokens=3, max_tokens=20)
WORDS = ["the", "a", "dog", "cat", "ran", "home", "saw", "was", "happy", "sad"]
WORDS += ["to", "and", "her", "his", "she", "found"]
SHORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=[f" {w}" for w in WORDS])
STRINGS = sum(len(WORDS) ** n for n in range(1, 4))
SHORT_ROW = {"x": "Tom had a dog. One day the dog was lost."}
SETTINGS: Settings = {
    "model": "embedded",
    "a": 1.5,  # power of p(z | x)
    "b": -0.5,  # power of p(z), negative
    "steps": 100,
    "rows": 12,
    "samples": 256,
    "adapter": {"long": 32, "short": 16},
    "long": {
        "num_samples": 12,
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-3,
        "objective": "subtb",
    },
    "short": {
        "num_samples": 64,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "epsilon": 0.1,
        "objective": "subtb",
    },
}


@dataclass(frozen=True)
class Task:
    """The target and its two parts. Of the short strings: the posterior, and log p(z | x) - log p(z) of each."""

    conditional: Target
    prior: Target
    target: Target
    rows: list[Row]
    truth: exact.ExactPosterior
    information: torch.Tensor

    def problems(self, target: Target) -> tuple[Problem, Problem]:
        """Stories, and short strings."""
        return Problem(target, PROMPT, LONG, self.rows), Problem(target, PROMPT, SHORT, [SHORT_ROW])


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Task:
    """Raises ConfigError for powers that do not form a contrast."""
    a, b = settings["a"], settings["b"]
    if a + b <= 0 or b >= 0:
        raise ConfigError(f"need b < 0 < a + b for a contrast that can be summed, got a={a}, b={b}")
    conditional, prior = lm.log_prob("{z}", given="{x}"), lm.log_prob("{z}")
    target, support = a * conditional + b * prior, SHORT.bind(lm)
    given, alone = (exact.enumerate_posterior(t, support, SHORT_ROW) for t in (conditional, prior))
    information = given.log_p + given.log_z - (alone.log_p + alone.log_z)
    rows = [{"x": story["x"]} for story in STORIES[: settings["rows"]]]
    truth = exact.enumerate_posterior(target, support, SHORT_ROW)
    return Task(conditional, prior, target, rows, truth, information)


def without_training(context: Context) -> Trained:
    return Trained(
        [untrained(context, problem).sampler for problem in context.data.problems(context.data.target)]
    )


def trained(context: Context, contrast: bool) -> Trained:
    """On the target, or on p(z | x)^a alone."""
    settings, task = context.settings, context.data
    problems = task.problems(task.target if contrast else settings["a"] * task.conditional)
    parts = []
    for name, problem, steps in zip(
        ("long", "short"), problems, (settings["steps"], 2 * settings["steps"]), strict=True
    ):
        config, adapter = {**settings[name], "max_steps": steps}, settings["adapter"][name]
        parts.append(train_gflownet(context, problem, config, name, adapter=adapter))
    return Trained([part.sampler for part in parts], sum(part.reward_evaluations for part in parts))


def exact_posterior(context: Context) -> Trained:
    return Trained(None)


def evaluate(context: Context, trained: Trained) -> Outcome:
    task: Task = context.data
    if trained.sampler is None:
        return Outcome(dict.fromkeys(STORY_FIGURES, nan) | short_figures(task, task.truth.log_p))
    long, short = trained.sampler
    rows = [story_figures(task, long, row, context.settings["samples"], context.seed) for row in task.rows]
    return Outcome(average(rows) | short_figures(task, exact.policy_log_probs(short.policy, SHORT_ROW)))


def story_figures(task: Task, posterior: Posterior, row: Row, samples: int, seed: int) -> Figures:
    rollouts, log_probs = posterior.policy.sample([row], samples, seed=("measure", seed))
    log_q = log_probs.final(rollouts.lengths)
    log_given, log_alone = (part.score_final(rollouts) for part in (task.conditional, task.prior))
    log_r = task.target.score_final(rollouts)
    found = importance.estimate(log_r - log_q, log_r)
    values = (
        (log_given - log_alone).mean().item(),
        log_given.mean().item(),
        log_alone.mean().item(),
        distinct(rollouts.completions()),
        found.ess,
        found.elbo,
    )
    return dict(zip(STORY_FIGURES, values, strict=True))


def short_figures(task: Task, log_q: torch.Tensor) -> Figures:
    """Exact figures of a distribution over the short strings."""
    d = exact.distance(log_q, task.truth.log_p)
    values = ((log_q.exp() * task.information).sum().item(), d.total_variation, d.kl_qp, d.kl_pq)
    return dict(zip(SHORT_FIGURES, values, strict=True))


STORY_FIGURES = ("log p(z|x) - log p(z)", "log p(z|x)", "log p(z)", "distinct", "ESS", "ELBO")
SHORT_FIGURES = tuple(f"short: {n}" for n in ("log p(z|x) - log p(z)", "TV", "KL(q||p)", "KL(p||q)"))


def notes(results: Results) -> str:
    s = results["settings"]
    return (
        f"The target is p(z|x)^{s['a']:g} p(z)^{s['b']:g}, and ESS, ELBO and distances are from it. *tempered* was "
        f"trained on p(z|x)^{s['a']:g} alone. Above: {s['samples']} samples for each of {s['rows']} stories; *short*: "
        f"by enumeration of {STRINGS:,} strings of one prompt, exact. Nats; ± between seeds."
    )


EXPERIMENT = Experiment(
    name="contrastive",
    question="Does dividing by a power of p(z) make continuations specific to their beginning?",
    presets={"small": SETTINGS},
    groups={"long": GFNConfig, "short": GFNConfig},
    prepare=prepare,
    methods={
        "untrained": without_training,
        "tempered": partial(trained, contrast=False),
        "contrastive": partial(trained, contrast=True),
        "exact posterior": exact_posterior,
    },
    once=frozenset({"exact posterior"}),
    evaluate=evaluate,
    metrics=metrics(*STORY_FIGURES, *SHORT_FIGURES),
    rows="metrics",
    summary=notes,
)

if __name__ == "__main__":
    command.main(EXPERIMENT)
