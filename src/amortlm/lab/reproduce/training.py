"""What the experiments share: making a policy, and training it by each method under a dry run and after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amortlm.engine.adapter import default_lora
from amortlm.lab.reproduce.experiment import Context, Trained
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.targets.base import Target
from amortlm.text.template import Messages
from amortlm.train import GFNConfig, GFNTrainer
from amortlm.train.run import can_resume
from amortlm.types import Row

Gold = Sequence[Sequence[str | list[int]]]  # gold completions: a list per row


def new_policy(
    context: Context, prompt: str | Messages, support: Support, *, lora: int = 1, seed: int = 0
) -> Policy:
    """The model itself under a prompt and on a support, with an adapter that has learned nothing yet."""
    from transformers import set_seed

    set_seed(seed)  # an adapter starts at random
    return Policy(context.lm, prompt, support, default_lora(lora))


def untrained(context: Context, target: Target, prompt: str | Messages, support: Support) -> Trained:
    return Trained(Posterior(new_policy(context, prompt, support), target.bind(context.lm)))


def train_gflownet(
    context: Context,
    *,
    target: Target,
    prompt: str | Messages,
    support: Support,
    rows: Sequence[Row],
    config: dict[str, Any],
    folder: Path,
    seed: int,
    lora: int = 32,
    adapter: str | Path | None = None,
    gold: Gold | None = None,
) -> Trained:
    """A posterior trained by `GFNTrainer`, from its last complete checkpoint in `folder` if there is one.

    config: fields of GFNConfig; adapter: a saved adapter to start from (default: a new one of rank `lora`);
    gold: completions for the replay buffer.
    """
    args = GFNConfig(**{"diagnose_steps": 0, **config, "output_dir": str(folder), "seed": seed})
    trainer = GFNTrainer(
        context.lm,
        target=target,
        prompt=prompt,
        support=support,
        train_dataset=rows,
        args=args,
        adapter=adapter or lora,
        gold=gold,
    )
    if context.dry_run:
        return Trained(trainer.posterior)
    found = can_resume(folder)
    trainer.train(resume_from_checkpoint=found, overwrite_output_dir=not found)
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_samples
    return Trained(trainer.posterior, args.max_steps * per_update)


def train_supervised(
    context: Context,
    policy: Policy,
    target: Target,
    *,
    rows: Sequence[Row],
    gold: Gold,
    folder: Path,
    seed: int,
    **settings: Any,
) -> Trained:
    """Maximum likelihood of gold completions; settings: those of `train_sft`."""
    from amortlm.lab.baselines.sft import train_sft

    if not context.dry_run:
        train_sft(policy, rows, gold, output_dir=folder, seed=seed, **settings)
    return Trained(Posterior(policy, target.bind(context.lm)))


def train_reinforced(
    context: Context,
    policy: Policy,
    target: Target,
    *,
    method: str,
    reward: Any,
    rows: Sequence[Row],
    folder: Path,
    seed: int,
    **settings: Any,
) -> Trained:
    """Reward maximised under a KL penalty, by "ppo" or TRL's "grpo"; settings: those of PPOConfig or `train_grpo`."""
    from amortlm.lab.baselines.finetune import BoundedReward, trl
    from amortlm.lab.baselines.grpo import train_grpo
    from amortlm.lab.baselines.ppo import PPOConfig, train_ppo

    bounded = BoundedReward(reward)
    target = target.bind(context.lm)
    if method == "ppo":
        config = PPOConfig(**settings)
        if not context.dry_run:
            train_ppo(policy, rows, bounded, config=config, output_dir=folder, seed=seed)
    else:
        trl("GRPOTrainer")  # a dry run, too, says that the extra is missing
        if not context.dry_run:
            train_grpo(policy, rows, bounded, output_dir=folder, seed=seed, method=method, **settings)
    return Trained(Posterior(policy, target), bounded.evaluations)
