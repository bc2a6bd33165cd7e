"""The memory of a run, before anything is loaded: `amortlm train SPEC --plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from amortlm.engine.footprint import Footprint, Shape
from amortlm.engine.quantised import packed_bytes
from amortlm.language_model import without_weights
from amortlm.policy.policy import Policy
from amortlm.train.defaults import LEAST, UPDATE

if TYPE_CHECKING:
    from amortlm.train.spec import RunSpec

DEVICES = (1, 8, 64)
NF4 = "nf4"  # a type for plans: weights in 4 bits (QLoRA), computing in bfloat16
MOMENTS = 2  # numbers that Adam keeps of a weight


@dataclass(frozen=True)
class Plan:
    """Bytes that a device holds in an update, by what they are."""

    footprint: Footprint
    shape: Shape
    dtype: torch.dtype
    packs: int  # of passes without gradient
    checkpointed: bool = False  # activations
    packed: bool = False  # the weights of p, in NF4

    def held(self, devices: int) -> dict[str, int]:
        """On each of so many devices that share the weights (FSDP) and have batches of their own."""
        f = self.footprint
        return {
            "weights of p": f.weights // devices,
            "weights of q": f.own // devices,
            "gradients": f.own // devices,
            "Adam": MOMENTS * f.own // devices,
            "a gathered block": f.block if devices > 1 else 0,
            "kept for backward": self._kept(devices),
            "logits and their gradient": 2 * f.logits,
            "passes without gradient": self.packs,
        }

    def _kept(self, devices: int) -> int:
        if self.checkpointed:
            return self.footprint.kept_checkpointed
        # Gradients of a sharded model flow through one pass, so prompts are not shared.
        return self.footprint.kept if devices == 1 else self.footprint.kept_whole

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of devices to plan for; packed weights are not sharded."""
        return DEVICES[:1] if self.packed else DEVICES

    def rows(self) -> list[list[object]]:
        """A table in GiB: a row for each kind, and the sum, with a column for each of `devices`."""
        each = [self.held(n) for n in self.devices]
        rows: list[list[object]] = [[name, *(held[name] / 2**30 for held in each)] for name in each[0]]
        return [*rows, ["sum", *(sum(held.values()) / 2**30 for held in each)]]

    def __str__(self) -> str:
        f, s = self.footprint, self.shape
        kind = NF4 if self.packed else str(self.dtype).removeprefix("torch.")
        return (
            f"p has {f.parameters:,} parameters in {kind}, and q trains "
            f"{f.trained:,}. On each device an update has {s.prompts * s.completions} completions of at most "
            f"{s.completion_tokens} tokens, after prompts ({s.prompts}) of at most {s.prompt_tokens}."
        )


def plan(spec: RunSpec, dtype: str | None = None) -> Plan:
    """The plan of a run, from config and tokenizer of its model.

    dtype: of the weights, by its name in torch, or `NF4`; None: what `LanguageModel.from_pretrained` takes here. Raises
    ConfigError for a model of which these cannot be read, PromptTooLongError for rows that do not fit it, and what
    `RunSpec.check` raises.
    """
    spec.check()
    lm = without_weights(spec.model, "bfloat16" if dtype == NF4 else dtype)
    rows, args = spec.rows(), spec.args("")
    policy = Policy(lm, spec.prompt, spec.bare_support(), spec.adapter)
    prompts = min(len(rows), args.per_device_train_batch_size)
    shape = Shape(
        prompts,
        max(map(len, policy.encode_rows(rows))),
        args.num_samples or max(LEAST, UPDATE // prompts),
        policy.support.max_tokens,
    )
    found = Footprint.of(lm.model, policy.model, shape)
    if dtype == NF4:
        found = replace(found, weights=packed_bytes(lm.model))
    checkpointed = bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))
    return Plan(found, shape, lm.model.dtype, int(lm.memory_mb * 2**20), checkpointed, dtype == NF4)
