"""What experiments share: a problem, and the methods that train on it, each with its dry run and able to resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from amortlm.lab.experiment import Context, Settings, Trained
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.text.template import Messages
from amortlm.train import GFNConfig, GFNTrainer
from amortlm.train.run import can_resume
from amortlm.types import Rollouts, Row

Gold = Sequence[Sequence[str | list[int]]]  # gold completions: a list per row


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows held out."""

    train: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Problem:
    """A posterior to be sampled. rows: those to train on; gold: their gold completions, where there are some."""

    target: Target
    prompt: str | Messages
    support: Support
    rows: Sequence[Row] = ()
    gold: Gold | None = None

    def policy(self, context: Context, adapter: int | None = None) -> Policy:
        """The model itself under the prompt and on the support, with an adapter that has learned nothing yet."""
        from transformers import set_seed

        set_seed(context.seed)  # an adapter starts at random
        return Policy(context.lm, self.prompt, self.support, adapter or context.settings["adapter"])

    def posterior(self, context: Context, policy: Policy) -> Posterior:
        return Posterior(policy, self.target.bind(context.lm))


def untrained(context: Context, problem: Problem) -> Trained:
    return Trained(problem.posterior(context, problem.policy(context, adapter=1)))


def config_of(context: Context, settings: Settings, part: str = "") -> GFNConfig:
    """settings: fields of GFNConfig; part: the subfolder to train in."""
    own = {"output_dir": str(context.folder / part), "seed": context.seed}
    return GFNConfig(**{"diagnose_steps": 0, **settings, **own})  # an experiment measures for itself


def train_gflownet(
    context: Context,
    problem: Problem,
    settings: Settings,
    part: str = "",
    *,
    adapter: int | None = None,
    start: Path | None = None,
) -> Trained:
    """A posterior trained by `GFNTrainer`, from its last complete checkpoint if there is one.

    settings: fields of GFNConfig; part: the subfolder to train in; adapter: the rank of a LoRA, by default the setting
    `adapter`; start: the folder of a saved adapter to start from.
    """
    args = config_of(context, settings, part)
    trainer = GFNTrainer(
        context.lm,
        target=problem.target,
        prompt=problem.prompt,
        support=problem.support,
        train_dataset=problem.rows,
        args=args,
        adapter=start or adapter or context.settings["adapter"],
        gold=problem.gold,
    )
    if context.dry_run:
        return Trained(trainer.posterior)
    args, found = trainer.args, can_resume(context.folder / part)
    trainer.train(resume_from_checkpoint=found, overwrite_output_dir=not found)
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_samples
    return Trained(trainer.posterior, args.max_steps * per_update)


def train_supervised(context: Context, problem: Problem, settings: Settings) -> Trained:
    """Maximum likelihood of gold completions, in the subfolder "sft"; settings: those of `train_sft`."""
    from amortlm.lab.baselines.sft import train_sft

    policy = problem.policy(context)
    if not context.dry_run:
        assert problem.gold is not None
        own: Settings = {"output_dir": context.folder / "sft", "seed": context.seed, "resume": True}
        train_sft(policy, problem.rows, problem.gold, **own, **settings)
    return Trained(problem.posterior(context, policy))


def from_supervised(context: Context, problem: Problem, settings: Settings) -> Path:
    """A folder with the adapter of `train_supervised`, for another method to start from; made once."""
    start = context.folder / "start"
    if not (start / "posterior.json").exists():
        train_supervised(context, problem, settings).sampler.save_pretrained(start)
    return start


def train_reinforced(
    context: Context,
    problem: Problem,
    method: str,
    settings: Settings,
    *,
    reward: Callable[[Rollouts], Tensor] | None = None,
    policy: Policy | None = None,
) -> Trained:
    """Reward maximised under a KL penalty, by "ppo" or TRL's "grpo"; settings: those of PPOConfig or `train_grpo`.

    reward: log R of the target by default; policy: what to start from, a new one by default.
    """
    from amortlm.lab.baselines.finetune import BoundedReward, trl
    from amortlm.lab.baselines.grpo import train_grpo
    from amortlm.lab.baselines.ppo import PPOConfig, train_ppo

    bounded = BoundedReward(reward or problem.target.score_final)
    policy = policy or problem.policy(context)
    if method == "ppo":
        settings = {"config": PPOConfig(**settings)}
    else:
        trl("GRPOTrainer")  # a dry run, too, says that the extra is missing
    if not context.dry_run:
        train = train_ppo if method == "ppo" else train_grpo
        own: Settings = {"output_dir": context.folder, "seed": context.seed, "resume": True}
        train(policy, problem.rows, bounded, **own, **settings)
    return Trained(problem.posterior(context, policy), bounded.evaluations)
