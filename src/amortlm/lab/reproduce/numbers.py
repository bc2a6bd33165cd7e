"""Random integers (Hu et al. 2024, section 4.1): who samples "uniformly between 0 and 100", and how exactly?

Every trained method sees the same number of completions. Only SFT sees none: it is told the truth, by integers drawn
uniformly (`sft.examples` of them, 50 in the presets). Both distances are sums over the 101 integers, not estimates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from amortlm.errors import ConfigError
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
from amortlm.lab.tasks.numbers import HIGHEST, SPEC, exactness
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.targets.spec import target_from_spec
from amortlm.types import Rollouts

ROWS: list[dict[str, str]] = [{}]


def prepare(settings: Settings, model: str | None, data: Path | None, dry_run: bool) -> Context:
    """The language model. Raises ConfigError where data are given: this experiment has none."""
    if data is not None:
        raise ConfigError("the experiment 'numbers' reads no data; leave out --data")
    lm = LanguageModel.from_pretrained(model or settings["model"])
    return Context(settings, lm, None, dry_run)


def target_of(context: Context) -> Target:
    """Uniform over the integers 0 to 100, each written in one way."""
    return target_from_spec(SPEC.target, context.lm)


def support_of(context: Context) -> Support:
    return Support(**{**SPEC.support, "max_tokens": context.settings["max_tokens"]})


def without_training(context: Context, seed: int, folder: Path) -> Trained:
    return untrained(context, target_of(context), SPEC.prompt, support_of(context))


def sft(context: Context, seed: int, folder: Path) -> Trained:
    """Supervised fine-tuning on integers drawn uniformly: samples of the posterior itself."""
    settings = dict(context.settings["sft"])
    gold = uniform_integers(settings.pop("examples"), seed)
    return train_supervised(
        context,
        start(context, seed),
        target_of(context),
        rows=ROWS,
        gold=[gold],
        folder=folder,
        seed=seed,
        max_steps=context.settings["steps"],
        **settings,
    )


def uniform_integers(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f" {draw.randint(0, HIGHEST)}" for _ in range(count)]


def reinforced(method: str) -> Callable[[Context, int, Path], Trained]:
    def train(context: Context, seed: int, folder: Path) -> Trained:
        settings, target = context.settings, target_of(context)
        return train_reinforced(
            context,
            start(context, seed),
            target,
            method=method,
            reward=validity(target),
            rows=ROWS,
            folder=folder,
            seed=seed,
            max_steps=settings["steps"],
            rows_per_step=1,
            num_samples=settings["num_samples"],
            **settings[method],
        )

    return train


def start(context: Context, seed: int) -> Policy:
    return new_policy(context, SPEC.prompt, support_of(context), lora=context.settings["lora"], seed=seed)


def validity(target: Target) -> Callable[[Rollouts], Tensor]:
    """The reward of reinforcement learning: 1 for a valid integer, 0 for anything else."""
    return lambda rollouts: (target.score_final(rollouts) == 0).float()


def gflownet(objective: str) -> Callable[[Context, int, Path], Trained]:
    """The method that trains with an objective: its own settings win over those of all three."""

    def train(context: Context, seed: int, folder: Path) -> Trained:
        settings = context.settings
        config = {
            "objective": objective,
            "max_steps": settings["steps"],
            "num_samples": settings["num_samples"],
            "per_device_train_batch_size": 1,
            "save_steps": settings["save_steps"],
            **settings["gflownet"],
            **settings[objective],
        }
        return train_gflownet(
            context,
            target=target_of(context),
            prompt=SPEC.prompt,
            support=support_of(context),
            rows=ROWS,
            config=config,
            folder=folder,
            seed=seed,
            lora=settings["lora"],
        )

    return train


def evaluate(context: Context, trained: Trained, seed: int) -> Outcome:
    """Exact figures: the seed changes nothing."""
    found = exactness(trained.sampler)
    metrics = {"valid": found.valid, "kl": found.kl, "tv": found.total_variation}
    return Outcome(metrics, {"probs": found.probs})


def figures(results: dict[str, Any], folder: Path) -> list[str]:
    """The paper's figure: the probability of each integer by method, with the uniform level. First seed of each."""
    from matplotlib.figure import Figure

    from amortlm.lab.plots import AFTER, DPI, INK, SMALL, TEXT, style

    runs = {method: found[0] for method, found in results["runs"].items()}
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    fig = Figure(figsize=(3.1 * columns, 2.5 * lines), dpi=DPI, layout="constrained", facecolor="white")
    for ax, (method, run) in zip(
        fig.subplots(lines, columns, squeeze=False).flat, runs.items(), strict=False
    ):
        ax.bar(range(HIGHEST + 1), run["details"]["probs"], width=1.0, color=AFTER)
        ax.axhline(1 / (HIGHEST + 1), color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        kl = run["metrics"]["kl"]
        ax.set_title(
            f"{method}\nvalid {100 * run['metrics']['valid']:.2f} %, KL {'–' if kl is None else f'{kl:.2g}'}",
            loc="left",
            fontsize=TEXT,
            color=INK,
        )
        ax.set(xlim=(-1, HIGHEST + 1))
        ax.set_ylim(0, max(0.03, 1.05 * max(run["details"]["probs"])))
        style(ax)
        ax.tick_params(labelsize=SMALL)
    for ax in fig.axes[len(runs) :]:
        ax.set_visible(False)
    fig.supxlabel("integer (dashed: uniform, 1/101)", fontsize=TEXT, color=INK)
    fig.supylabel("probability", fontsize=TEXT, color=INK)
    fig.savefig(folder / "histograms.png", format="png", metadata={"Software": None})
    return ["histograms.png"]


EXPERIMENT = Experiment(
    name="numbers",
    question="Asked for an integer drawn uniformly between 0 and 100, how near to uniform does each method bring a "
    "language model, at equal numbers of judged completions?",
    presets=read_presets("numbers"),
    prepare=prepare,
    methods={
        "untrained": without_training,
        "sft": sft,
        "ppo": reinforced("ppo"),
        "grpo": reinforced("grpo"),
        "gflownet-subtb": gflownet("subtb"),
        "gflownet-tb": gflownet("tb"),
        "gflownet-vargrad": gflownet("vargrad"),
    },
    evaluate=evaluate,
    metrics={
        "valid": Metric("valid", ".4%", "higher", "probability of an integer from 0 to 100, exact"),
        "kl": Metric("KL(U‖q), nats", ".4f", "lower", "KL divergence from uniform to the sampler, exact"),
        "tv": Metric("TV(U, q)", ".4f", "lower", "total variation distance to uniform, exact"),
    },
    figures=figures,
    paper={
        "base model": {"valid": 0.505, "kl": 3.37},
        "PPO": {"valid": 0.958},
        "GFlowNet": {"valid": 1.0, "kl": 9.75e-5},
    },
    paper_setting="GPT-J 6B, LoRA r = 512, completions of up to 5 tokens",
)
