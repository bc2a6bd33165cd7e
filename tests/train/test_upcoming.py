"""The rows of coming updates are known before the trainer asks for them. For two processes: test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainers import make_trainer, watch

from amortlm import LanguageModel


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},  # three micro-batches of an epoch: the second update has one
        {"dataloader_drop_last": True},
        {"per_device_train_batch_size": 8},  # an epoch is one update
        {"max_steps": -1, "num_train_epochs": 2.5},
    ],
)
def test_they_are_those_that_training_uses(
    one_lm: LanguageModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(one_lm, tmp_path, **({"max_steps": 7, "num_samples": 2} | settings))
    told, used = watch(trainer)
    trainer.train()
    last = trainer.state.max_steps
    assert len(used) == last
    assert told == used | {later: [] for later in range(last, last + 3)}
    assert told[0] != told[1], "control: the updates have different rows"
