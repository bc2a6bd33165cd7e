"""Sharded training (FSDP2): the settings of `accelerate launch` or `fsdp`, and models that are sharded by them.

accelerate reads the settings, but shards one model, on an accelerator, and wraps what is called in training. Here p is
sharded, too, and all code calls the models themselves. So the models are sharded before the trainer sees them, and
accelerate is not told (`unseen`): for it these are processes that each have a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from amortlm.engine.adapter import is_plain
from amortlm.engine.model import CausalLM
from amortlm.engine.shards import Frozen, Shards, distribute
from amortlm.errors import ConfigError
from amortlm.policy.policy import Policy
from amortlm.train.config import GFNConfig
from amortlm.train.processes import Processes
from amortlm.types import Rollouts

LAUNCHED = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets
SIZE_BASED = "size_based_auto_wrap_policy"


def is_asked(args: GFNConfig) -> bool:
    return bool(args.fsdp) or os.environ.get(LAUNCHED, "false").lower() == "true"


def settings(args: GFNConfig) -> Any:
    """accelerate's record of the settings. Raises ConfigError for those that cannot be had."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    given = getattr(args, "fsdp_plugin_args", None)
    if args.fsdp and given is None:
        raise ConfigError("fsdp needs transformers 5.23 or newer: install it, or use `accelerate launch --use_fsdp`")
    before = os.environ.get(LAUNCHED)
    found = FullyShardedDataParallelPlugin(**(given or {}))
    if before is None:
        os.environ.pop(LAUNCHED, None)
    for wrong, remedy in (
        (found.fsdp_version != 2, "version 1 is not supported: set version 2 (--fsdp_version 2)"),
        (not found.reshard_after_forward, "reshard_after_forward=False would keep weights of the last update: leave it out"),
        (_offloads(found), "weights cannot be offloaded to the CPU: leave cpu_offload out"),
        (
            found.activation_checkpointing,
            "leave its activation_checkpointing out, and set activation_checkpointing=True in GFNConfig",
        ),
        (
            getattr(found.auto_wrap_policy, "__name__", "") == SIZE_BASED,
            "layers are sharded by class: leave auto_wrap_policy out",
        ),
    ):
        if wrong:
            raise ConfigError(f"fsdp: {remedy}")
    return found


def _offloads(found: Any) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(found.cpu_offload, CPUOffloadPolicy)


def check(args: GFNConfig, policy: Policy, processes: Processes) -> None:
    """Raise ConfigError for what sharded models cannot do."""
    lm = policy.lm
    if processes.count == 1:
        raise ConfigError(
            "fsdp shards a model over processes, and there is one: start several with torchrun or accelerate launch"
        )
    if args.fp16:
        raise ConfigError("fsdp: with fp16 losses are scaled, which sharded models do not do here: set bf16, or neither")
    if not all(p.is_floating_point() for p in lm.model.parameters()):
        raise ConfigError(f"fsdp: {lm.name} is quantised, and cannot be sharded: load it with dtype=torch.bfloat16")
    if not policy.is_full and not is_plain(policy.model.peft_config["default"]):
        raise ConfigError(
            "fsdp: with this adapter p is not the model with its adapter switched off: train plain LoRA (no bias, no "
            "modules_to_save, an init_lora_weights that leaves the model's weights), or 'full'"
        )
    if policy.sharing.switch is not None:
        raise ConfigError(
            f"fsdp: {lm.name} changes its rotary embedding with the length of a text (LongRoPE), so that gradients need "
            "several passes: train it whole, one model per process"
        )


def shard(args: GFNConfig, policy: Policy, processes: Processes, names: Sequence[str]) -> None:
    """Shard q and p over the processes. names: of the weights; ConfigError if they differ between processes."""
    from torch.distributed.device_mesh import init_device_mesh

    found = settings(args)
    check(args, policy, processes)
    if len({tuple(each) for each in processes.gather(list(names))}) > 1:
        raise ConfigError(
            "the processes have loaded different weights: make the model before GFNConfig, or set "
            "cpu_ram_efficient_loading (--fsdp_cpu_ram_efficient_loading) to false"
        )
    lm = policy.lm
    trees = [policy.model, lm.model] if policy.is_full else [policy.model]
    if not policy.is_full:
        lm.model = Frozen(policy.model, lm.model)  # also so that nobody holds the whole weights
    mesh = init_device_mesh(args.device.type, (processes.count,))
    for tree in trees:
        distribute(tree, _blocks(found, trees[-1]), mesh)
    processes.shards = Shards(trees, processes.agree)


def _blocks(found: Any, model: Any) -> set[str]:
    if found.transformer_cls_names_to_wrap:
        return set(found.transformer_cls_names_to_wrap)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(getattr(base, "_no_split_modules", None) or ())


@contextmanager
def unseen(args: GFNConfig) -> Iterator[None]:
    """In the block nothing says that FSDP is asked for."""
    given, launched = getattr(args, "fsdp_plugin_args", None), os.environ.pop(LAUNCHED, None)
    vars(args)["fsdp_plugin_args"] = None
    try:
        yield
    finally:
        vars(args)["fsdp_plugin_args"] = given
        if launched is not None:
            os.environ[LAUNCHED] = launched


class Wrapped(nn.Module):
    """The sharded policy as the trainer calls it: like what DDP makes of a policy, but without DDP."""

    def __init__(self, policy: Policy, accelerator: Any):
        super().__init__()
        self.policy, self._accelerator = policy, accelerator

    def forward(self, rollouts: Rollouts) -> Any:
        with self._accelerator.autocast():
            return self.policy(rollouts)


def average(tensor: torch.Tensor, count: int) -> None:
    """Its mean over the processes, in place."""
    torch.distributed.all_reduce(tensor)
    tensor /= count
