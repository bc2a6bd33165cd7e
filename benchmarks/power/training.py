"""A trainer whose policy starts at the frozen model at a temperature."""

from __future__ import annotations

from typing import Any

from amortlm import GFNTrainer


class TemperedTrainer(GFNTrainer):
    """q is the softmax of its logits / temperature, also in the loss. It is not saved: a folder has no temperature."""

    def __init__(self, *args: Any, temperature: float, **given: Any):
        super().__init__(*args, **given)
        if temperature != 1:
            self.policy.support = self.policy.support.tempered(temperature)

    def save_model(self, *args: Any, **given: Any) -> None:
        pass
