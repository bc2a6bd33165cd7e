"""Does each part of the training procedure help? The paper leaves it open.

One thing at a time differs from the default: replay, tempered behaviour, a temperature of the reward that falls
from 1.5 to 1, SubTB on a few random stopping states in place of all, and VarGrad. There are two targets: one that
can be enumerated, where the distance from the posterior is exact, and story infilling, measured by importance weights.

    python recipes/ablations.py --output runs/ablations
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _common import average, importance_figures, metrics
from amortlm import LanguageModel, Support, exact
from amortlm.lab import command
from amortlm.lab.experiment import Context, Experiment, Outcome, Results, Settings, Trained
from amortlm.lab.tasks import infilling
from amortlm.lab.training import Problem, train_gflownet
from amortlm.train import GFNConfig

WORDS = [" he", " she", " found", " the", " dog", " home", " was", " her"]
SHORT = Support(stop=".", min_tokens=1, max_tokens=4, allowed_tokens=WORDS)
STRINGS = sum(len(WORDS) ** n for n in range(1, 5))
SHORT_ROW = {
    "x": "Tom had a dog. One day the dog was lost.",
    "y": "Tom was happy to have his dog again.",
}
SETTINGS: Settings = {
    "model": "embedded",
    "steps": 60,
    "short_steps": 80,
    "stories": 4,
    "samples": 256,
    "adapter": 16,
    "common": {"objective": "subtb", "behaviour": {"replay": 0.25, "tempered": 0.375}},
    "short": {"num_samples": 32, "per_device_train_batch_size": 1, "learning_rate": 1e-3},
    "stories_config": {"num_samples": 12, "per_device_train_batch_size": 2, "learning_rate": 2e-3},
}
SOME, FEW = {"short": 3, "stories": 6}, {"short": 2, "stories": 3}


def changes(task: str, steps: int) -> dict[str, dict[str, Any]]:
    """What each method changes. The schedule ends half-way, so that the later updates train on the target itself."""
    return {
        "default": {},
        "no replay": {"behaviour": {"tempered": 0.5}},
        "no tempering": {"behaviour": {"replay": 0.25}},
        "reward T 1.5 to 1": {"reward_temperature": (1.5, 1.0, max(1, steps // 2))},
        "some states": {"objective": {"subtb": {"states": SOME[task]}}},
        "few states": {"objective": {"subtb": {"states": FEW[task]}}},
        "VarGrad": {"objective": "vargrad"},
        "VarGrad, own samples": {"objective": "vargrad", "behaviour": {"policy": 1.0}},
    }


@dataclass(frozen=True)
class Tasks:
    """The two targets. The enumerable one is tempered, since one string would have nearly all the mass otherwise."""

    short: Problem
    stories: Problem
    truth: exact.ExactPosterior


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Tasks:
    target, spec = lm.log_prob("{z} {y}", given="{x}"), infilling.SPEC
    rows = [dict(row) for row in infilling.STORIES[: settings["stories"]]]
    truth = exact.enumerate_posterior(target / 2, SHORT.bind(lm), SHORT_ROW)
    stories = Problem(target, str(spec.prompt), Support(**spec.support), rows)
    return Tasks(Problem(target / 2, "{x}", SHORT, [SHORT_ROW]), stories, truth)


def method(context: Context, name: str) -> Trained:
    """Both posteriors, each with the seconds of its training."""
    settings, tasks, made, judged = context.settings, context.data, [], 0
    for task, problem, own, steps in (
        ("short", tasks.short, settings["short"], settings["short_steps"]),
        ("stories", tasks.stories, settings["stories_config"], settings["steps"]),
    ):
        config = settings["common"] | own | changes(task, steps)[name] | {"max_steps": steps}
        start = time.perf_counter()
        trained = train_gflownet(context, problem, config, task)
        made.append((trained.sampler, time.perf_counter() - start))
        judged += trained.reward_evaluations
    return Trained(made, judged)


def evaluate(context: Context, trained: Trained) -> Outcome:
    (short, short_seconds), (stories, stories_seconds) = trained.sampler
    d = exact.distance(exact.policy_log_probs(short.policy, SHORT_ROW), context.data.truth.log_p)
    rows, n = context.data.stories.rows, context.settings["samples"]
    found = [stories.estimate(row, n, seed=("measure", context.seed)) for row in rows]
    figures = average([importance_figures(e) for e in found])
    return Outcome(
        {
            "short: TV": d.total_variation,
            "short: KL(q||p)": d.kl_qp,
            "short: KL(p||q)": d.kl_pq,
            "short: seconds": short_seconds,
            **{f"stories: {name}": value for name, value in figures.items()},
            "stories: seconds": stories_seconds,
        }
    )


def notes(results: Results) -> str:
    settings = results["settings"]
    return (
        f"*short*: infilling at T = 2 on {STRINGS:,} strings of one prompt, {settings['short_steps']} updates, exact. "
        f"*stories*: {settings['stories']} stories, {settings['steps']} updates, {settings['samples']} samples each. "
        "Default: SubTB on all stopping states, a quarter of the prompts replayed, half of the others tempered, no "
        f"schedule. *some states*: {SOME['short']} (short) and {SOME['stories']} (stories) at random, the last always; "
        f"*few*: {FEW['short']} and {FEW['stories']}. Seconds are those of training. Nats; ± between seeds: "
        "differences within it are none."
    )


EXPERIMENT = Experiment(
    name="ablations",
    question="Does each part of the training procedure help?",
    presets={"small": SETTINGS},
    groups=dict.fromkeys(("common", "short", "stories_config"), GFNConfig),
    prepare=prepare,
    methods={name: partial(method, name=name) for name in changes("short", 1)},
    evaluate=evaluate,
    metrics=metrics(
        *(f"short: {name}" for name in ("TV", "KL(q||p)", "KL(p||q)", "seconds")),
        *(f"stories: {name}" for name in ("ESS", "ELBO", "var log w", "seconds")),
    ),
    rows="metrics",
    summary=notes,
)

if __name__ == "__main__":
    command.main(EXPERIMENT)
