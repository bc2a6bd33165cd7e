"""A tiny infilling trainer, and what tests look at in one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Support
from amortlm.engine.adapter import default_lora

ROWS = [
    {"x": x, "y": y} for x, y in (("a b", " c"), ("b", " a"), ("c a b", " b"), ("a", " d"), ("d c", " a"))
]


def make_trainer(lm: LanguageModel, folder: Path, rows: Any = None, **settings: Any) -> GFNTrainer:
    """A trainer of the infilling target with small batches; `settings` go to GFNConfig or GFNTrainer, those in
    `extra` to the latter."""
    own = settings.pop("extra", {}) | {
        k: settings.pop(k) for k in ("target", "prompt", "support", "gold", "adapter") if k in settings
    }
    config = {
        "max_steps": 4,
        "objective": "subtb",
        "num_samples": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "diagnose_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        **settings,
    }
    arguments = {
        "target": lm.log_prob("{z}{y}", given="{x}"),
        "prompt": "{x}{y}",
        "support": Support(stop=".", min_tokens=1, max_tokens=3),
        "adapter": default_lora(4),
        **own,
    }
    return GFNTrainer(
        lm,
        train_dataset=ROWS if rows is None else rows,
        args=GFNConfig(output_dir=str(folder), **config),
        **arguments,
    )


def weights(trainer: GFNTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters() if p.requires_grad])


def losses(trainer: GFNTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def watch(trainer: GFNTrainer) -> tuple[dict[int, Any], dict[int, Any]]:
    """(what the trainer says, at each update, of the micro-batches of this one and the next three; those that it used),
    by update, filled while it runs."""
    told: dict[int, Any] = {}
    used: dict[int, Any] = {}
    begin, collect = trainer.source.begin, trainer.source.collect

    def asking(update: int, upcoming: Any) -> None:
        told.update({later: upcoming(later) for later in range(update, update + 4)})
        begin(update, upcoming)

    def noting(rows: Any, step: Any) -> Any:
        used.setdefault(step[0], []).append(list(rows))
        return collect(rows, step)

    trainer.source.begin, trainer.source.collect = asking, noting  # type: ignore[method-assign]
    return told, used


class EmptyBuffer(TrainerCallback):
    def __init__(self, trainer: GFNTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.buffer._entries.clear()


class Accident(TrainerCallback):
    """Process 1 is killed ("dies") before an update, or sleeps."""

    def __init__(self, kind: str, update: int):
        self.kind, self.update = kind, update

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update - 1 and args.process_index == 1:
            if self.kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
