"""What the fine-tuning baselines share: a working copy of a policy, rewards, and quiet settings for TRL."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortlm.errors import RewardError
from amortlm.lab.extras import extra
from amortlm.policy import Policy
from amortlm.types import Rollouts

Reward = Callable[[Rollouts], Tensor]  # [B] of finished completions


class BoundedReward:
    """A reward that is never below `floor`, with a count of the completions it has judged.

    Pass an instance to `train_grpo` or `train_ppo` to read `evaluations` afterwards.
    """

    def __init__(self, reward: Reward, floor: float = -100.0):
        self.reward, self.floor = reward, floor
        self.evaluations = 0

    @classmethod
    def of(cls, reward: Reward, floor: float) -> BoundedReward:
        return reward if isinstance(reward, cls) else cls(reward, floor)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """[B] float32, at least `floor`. Raises RewardError for NaN, +inf or a wrong shape."""
        values = torch.as_tensor(self.reward(rollouts)).float()
        self.evaluations += len(rollouts)
        if values.shape != (len(rollouts),):
            raise RewardError(f"a reward of {len(rollouts)} completions has shape {tuple(values.shape)}")
        if torch.isnan(values).any() or torch.isposinf(values).any():
            raise RewardError("the reward is NaN or +inf; return finite numbers (or -inf for 'impossible')")
        return values.clamp(min=self.floor)


def working_copy(policy: Policy) -> Policy:
    """A policy with trainable tensors of its own; the language model and its frozen tensors are shared."""
    memo: dict[int, Any] = {id(policy.lm): policy.lm}
    memo |= {id(p): p for p in policy.lm.model.parameters()}
    return copy.deepcopy(policy, memo)


@torch.no_grad()
def adopt_weights(policy: Policy, trained: Policy) -> Policy:
    """`policy` with the trainable weights of a working copy."""
    for name, p in policy.model.named_parameters():
        if p.requires_grad:
            p.copy_(trained.model.get_parameter(name))
    return policy


def trl(*names: str) -> list[Any]:
    """Public classes of TRL. Raises MissingExtraError where it is not installed."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every run otherwise
    # TRL warns that `rollout_func` may change; the extra `[baselines]` allows only versions that have it.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    package = extra("trl", "training by SFT or GRPO")
    return [getattr(package, name) for name in names]


def trl_settings(policy: Policy, output_dir: str | Path, seed: int) -> dict[str, Any]:
    """Settings of every TRL trainer: the policy's own precision and device, no tracker, no checkpoint."""
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": policy.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "lr_scheduler_type": "linear",
    }


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about deprecated names in TRL's own settings, and no progress bars of tiny data sets."""
    import datasets
    from transformers import logging

    level, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def run_trl(trainer: Any, log: Path) -> None:
    """Train in silence, and write the trainer's log as JSON lines."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    write_jsonl(log, trainer.state.log_history)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
