"""What the experiments share: training a GFlowNet sampler under a dry run and across interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amortlm.policy import Support, default_lora
from amortlm.posterior import Posterior
from amortlm.reproduce.experiment import Context, Trained
from amortlm.targets.base import Target
from amortlm.targets.template import Messages
from amortlm.train import GFNConfig, GFNTrainer
from amortlm.train.checkpoints import list_complete
from amortlm.types import Row


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
    seeds: Sequence[Sequence[str | list[int]]] | None = None,
) -> Trained:
    """A posterior trained by `GFNTrainer`, from its last complete checkpoint in `folder` if there is one.

    config: fields of GFNConfig; adapter: a saved adapter to start from (default: a new one of rank `lora`);
    seeds: gold completions for the replay buffer.
    """
    args = GFNConfig(**{"diagnose_steps": 0, **config, "output_dir": str(folder), "seed": seed})
    trainer = GFNTrainer(
        context.lm,
        target=target,
        prompt=prompt,
        support=support,
        train_dataset=rows,
        args=args,
        peft_config=str(adapter) if adapter else default_lora(lora),
        seeds=seeds,
    )
    if context.dry_run:
        return Trained(trainer.posterior)
    trainer.train(resume_from_checkpoint=bool(list_complete(folder)))
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_samples
    return Trained(trainer.posterior, args.max_steps * per_update)


def untrained(context: Context, target: Target, prompt: str | Messages, support: Support) -> Trained:
    """The model itself under the policy's prompt, on the support."""
    from amortlm.policy import Policy

    return Trained(Posterior(Policy(context.lm, prompt, support, default_lora(1)), target.bind(context.lm)))
