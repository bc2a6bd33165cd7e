"""What the fine-tuning baselines share: rewards, the rows of a step, a working copy of a policy, and TRL's trainers."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError
from amortlm.lab.baselines.resume import EVERY
from amortlm.lab.extras import extra
from amortlm.policy import Policy
from amortlm.types import Rollouts

T = TypeVar("T")
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


def rows_of_step(rows: Sequence[T], n: int, step: int, seed: int) -> list[T]:
    """n rows of an endless shuffled sequence: every row once in each pass over the data."""
    if n > len(rows):
        raise ConfigError(f"rows_per_step={n} needs at least so many rows, got {len(rows)}")
    per_pass = len(rows) // n
    order = list(range(len(rows)))
    random.Random(f"{seed} {step // per_pass}").shuffle(order)
    start = step % per_pass * n
    return [rows[i] for i in order[start : start + n]]


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


def trl_settings(policy: Policy, output_dir: str | Path, seed: int, resume: bool) -> dict[str, Any]:
    """Settings of every TRL trainer: the policy's own precision and device, no tracker, and checkpoints if resume."""
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": policy.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "steps" if resume else "no",
        "save_steps": EVERY,
        "save_total_limit": 1,
        "dataloader_pin_memory": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "lr_scheduler_type": "linear",
    }


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about deprecated names in TRL's own settings, and no progress bars of tiny data sets and files."""
    import datasets
    from transformers import logging

    level, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    file_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if file_bars:
            logging.enable_progress_bar()
        if bars:
            datasets.enable_progress_bars()


def run_trl(trainer: Any, log: Path, resume: bool) -> int:
    """Train in silence, from the last checkpoint if resume, and write the trainer's log as JSON lines. Returns the
    number of steps that an interrupted run had done."""
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(trainer.args.output_dir) if resume else None
    trainer.train(resume_from_checkpoint=last)
    write_jsonl(log, trainer.state.log_history)
    return int(last.rpartition("-")[2]) if last else 0


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
