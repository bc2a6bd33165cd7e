"""Random integers (Hu et al. 2024, section 4.1): who samples "uniformly between 0 and 100", and how exactly?

Every trained method draws the same number of completions, but for SFT: it learns from integers drawn uniformly
(`sft.examples` of them, 50 in the presets). Both distances are sums over the 101 integers, not estimates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from amortlm.lab.baselines.ppo import PPOConfig
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Results, Settings, Trained
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.numbers import HIGHEST, SPEC, exactness
from amortlm.lab.training import Problem, train_gflownet, train_reinforced, train_supervised, untrained
from amortlm.language_model import LanguageModel
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.targets.spec import target_from_spec
from amortlm.train import GFNConfig
from amortlm.types import Rollouts

OBJECTIVES = ("subtb", "tb", "vargrad")


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Problem:
    """Uniform over the integers 0 to 100, each written in one way."""
    support = Support(**{**SPEC.support, "max_tokens": settings["max_tokens"]})
    return Problem(target_from_spec(SPEC.target, lm), SPEC.prompt, support, [{}])


def without_training(context: Context) -> Trained:
    return untrained(context, context.data)


def sft(context: Context) -> Trained:
    """Supervised fine-tuning on integers drawn uniformly: samples of the posterior itself."""
    settings = {"max_steps": context.settings["steps"], **context.settings["sft"]}
    problem = replace(context.data, gold=[uniform_integers(settings.pop("examples"), context.seed)])
    return train_supervised(context, problem, settings)


def uniform_integers(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f" {draw.randint(0, HIGHEST)}" for _ in range(count)]


def common(settings: Settings) -> Settings:
    return {"max_steps": settings["steps"], "num_samples": settings["num_samples"]}


def reinforced(context: Context, method: str) -> Trained:
    settings = {**common(context.settings), "rows_per_step": 1, **context.settings[method]}
    reward = validity(context.data.target)
    return train_reinforced(context, context.data, method, settings, reward=reward)


def validity(target: Target) -> Callable[[Rollouts], Tensor]:
    """The reward of reinforcement learning: 1 for a valid integer, 0 for anything else."""
    return lambda rollouts: (target.score_final(rollouts) == 0).float()


def gflownet(context: Context, objective: str) -> Trained:
    """Trained with an objective. Its own settings replace those that all three share."""
    settings = context.settings
    config = {
        "objective": objective,
        **common(settings),
        "per_device_train_batch_size": 1,
        "save_steps": settings["save_steps"],
        **settings["gflownet"],
        **settings[objective],
    }
    return train_gflownet(context, context.data, config)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Exact figures: the seed changes nothing."""
    found = exactness(trained.sampler)
    metrics = {"valid": found.valid, "kl": found.kl, "tv": found.total_variation}
    return Outcome(metrics, {"probs": found.probs})


def figures(results: Results, folder: Path) -> list[str]:
    """The paper's figure: the probability of each integer by method, with the uniform level. First seed of each."""
    from amortlm.plots import AFTER, INK, SMALL, TEXT, panels, save, style

    runs: dict[str, Any] = {method: found[0] for method, found in results["runs"].items()}
    fig, axes = panels(len(runs), 4, (3.1, 2.5))
    for ax, (method, run) in zip(axes, runs.items(), strict=True):
        ax.bar(range(HIGHEST + 1), run["details"]["probs"], width=1.0, color=AFTER)
        ax.axhline(1 / (HIGHEST + 1), color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        kl = "–" if run["metrics"]["kl"] is None else f"{run['metrics']['kl']:.2g}"
        title = f"{method}\nvalid {100 * run['metrics']['valid']:.2f} %, KL {kl}"
        ax.set_title(title, loc="left", fontsize=TEXT, color=INK)
        ax.set(xlim=(-1, HIGHEST + 1), ylim=(0, max(0.03, 1.05 * max(run["details"]["probs"]))))
        style(ax)
        ax.tick_params(labelsize=SMALL)
    fig.supxlabel("integer (dashed: uniform, 1/101)", fontsize=TEXT, color=INK)
    fig.supylabel("probability", fontsize=TEXT, color=INK)
    return save(fig, folder / "histograms.png")


EXPERIMENT = Experiment(
    name="numbers",
    question="Asked for an integer drawn uniformly between 0 and 100, how near to uniform does each method bring a "
    "language model, at equal numbers of judged completions?",
    presets=read_presets("numbers"),
    groups={"ppo": PPOConfig, **dict.fromkeys(("gflownet", *OBJECTIVES), GFNConfig)},
    prepare=prepare,
    methods={
        "untrained": without_training,
        "sft": sft,
        **{name: partial(reinforced, method=name) for name in ("ppo", "grpo")},
        **{f"gflownet-{name}": partial(gflownet, objective=name) for name in OBJECTIVES},
    },
    evaluate=evaluate,
    metrics={
        "valid": Metric("valid", ".4%", "higher", "probability of an integer from 0 to 100, exact"),
        "kl": Metric("KL(U‖q), nats", ".4f", "lower", "KL divergence from uniform to the sampler, exact"),
        "tv": Metric("TV(U, q)", ".4f", "lower", "total variation distance to uniform, exact"),
    },
    figures=figures,
    paper={
        "base model": {"valid": "50.5%", "kl": "3.37"},
        "PPO": {"valid": "95.8%"},
        "GFlowNet": {"valid": "100%", "kl": "9.75e-5"},
    },
    paper_setting="GPT-J 6B, LoRA r = 512, completions of up to 5 tokens",
)
