"""Sharded training (FSDP2): the settings of `accelerate launch` or `fsdp`, and models that are sharded by them.

accelerate reads the settings. But it shards one model, on accelerators alone, and only as the trainer calls it; here p
is sharded, too, and all code calls the models themselves. So they are sharded before the trainer sees them, and
accelerate is not told (`unseen`): what it sees is several processes, each with a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from amortlm.engine.adapter import is_plain
from amortlm.engine.quantised import is_quantised
from amortlm.engine.shards import Frozen, Shards, distribute
from amortlm.errors import ConfigError
from amortlm.policy.policy import Policy
from amortlm.train.config import GFNConfig
from amortlm.train.processes import Processes
from amortlm.types import PolicyLogProbs, Rollouts

LAUNCHED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"  # what `accelerate launch` sets


def is_asked(args: GFNConfig) -> bool:
    return bool(args.fsdp) or os.environ.get(LAUNCHED, "false").lower() == "true"


def shard(args: GFNConfig, policy: Policy, processes: Processes, names: Sequence[str]) -> None:
    """Shard q and p over the processes. names: of their weights, by which processes see that they have the same.

    Raises ConfigError for settings, adapters and models that cannot be had."""
    settings = _settings(args)
    _check(args, policy, processes)
    if len({tuple(each) for each in processes.gather(list(names))}) > 1:
        raise ConfigError(
            "the processes have loaded different weights: make the LanguageModel before GFNConfig, or set "
            "cpu_ram_efficient_loading (--fsdp_cpu_ram_efficient_loading) to false"
        )
    lm = policy.lm
    blocks = _blocks(settings, lm.model)
    trees = [policy.model]
    if policy.is_full:
        trees.append(lm.model)
    else:
        lm.model = Frozen(policy.model, lm.model)  # also so that nobody holds the whole weights
    mesh = init_device_mesh(args.device.type, (processes.count,))
    for tree in trees:
        distribute(tree, blocks, mesh)
    processes.shards = Shards(trees, processes.agree)


def _settings(args: GFNConfig) -> FullyShardedDataParallelPlugin:
    """accelerate's record of the settings. Raises ConfigError for those that cannot be had."""
    given = getattr(args, "fsdp_plugin_args", None)
    if args.fsdp and given is None:
        raise ConfigError("fsdp needs transformers 5.23 or newer; `accelerate launch --use_fsdp` does not")
    if int((given or {}).get("fsdp_version") or os.environ.get(VERSION, "1")) != 2:
        raise ConfigError("fsdp: version 1 is not supported: set version to 2 (--fsdp_version 2)")
    try:
        found = FullyShardedDataParallelPlugin(**(given or {}))
    except (ValueError, RuntimeError, ImportError) as e:
        raise ConfigError(f"fsdp: {e}") from e
    refused = {
        "reshard_after_forward=False, with which draws would be those of old weights": not found.reshard_after_forward,
        "cpu_offload, because draws need the weights on the device": "CPU"
        in type(found.cpu_offload).__name__,
        "activation_checkpointing in fsdp_config (activation_checkpointing=True of GFNConfig does the same)": (
            found.activation_checkpointing
        ),
        "auto_wrap_policy by size (layers are gathered by their class)": (
            "size" in getattr(found.auto_wrap_policy, "__name__", "")
        ),
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ConfigError(f"fsdp: leave out {setting}")
    return found


def _check(args: GFNConfig, policy: Policy, processes: Processes) -> None:
    name, model = policy.lm.name, policy.lm.model
    if processes.count == 1:
        raise ConfigError("fsdp: there is one process; start several, with torchrun or accelerate launch")
    if args.max_staleness:
        raise ConfigError(
            "fsdp: a server's draws from older weights are checked with these, which are gone: set max_staleness=0"
        )
    if args.fp16:
        raise ConfigError("fsdp: fp16 is not supported: set bf16, or neither")
    if is_quantised(model):
        raise ConfigError(
            f"fsdp: {name} is quantised and cannot be sharded: load it with dtype=torch.bfloat16"
        )
    if not policy.is_full and not _is_plain_lora(policy.model):
        raise ConfigError(
            "fsdp: p would not be the model with this adapter switched off: train plain LoRA (no bias, no "
            "modules_to_save, an init_lora_weights that does not change the model's weights), or 'full'"
        )
    if policy.sharing.switch is not None:
        raise ConfigError(
            f"fsdp: {name} has other rotary embeddings for long texts (LongRoPE), which need passes of their own, and "
            "processes would have different numbers of them: leave fsdp out"
        )


def _is_plain_lora(model: Any) -> bool:
    """Is it LoRA, all of it trained, on a model that is p?"""
    parts = [p for name, p in model.named_parameters() if "lora_" in name]
    return is_plain(model.peft_config["default"]) and all(p.requires_grad for p in parts)


def _blocks(settings: FullyShardedDataParallelPlugin, model: Any) -> set[str]:
    """The classes of the layers that are gathered one after the other."""
    named = settings.transformer_cls_names_to_wrap
    found = set(named or getattr(model, "_no_split_modules", None) or ())
    if missing := found - {type(m).__name__ for m in model.modules()} if named else None:
        raise ConfigError(
            f"fsdp: transformer_layer_cls_to_wrap names {sorted(missing)[0]}, which is not the class of any module of "
            f"{type(model).__name__}"
        )
    return found


@contextmanager
def unseen(args: GFNConfig) -> Iterator[None]:
    """In the block, nothing says that sharding is asked for."""
    given, launched = getattr(args, "fsdp_plugin_args", None), os.environ.pop(LAUNCHED, None)
    vars(args)["fsdp_plugin_args"] = None
    try:
        yield
    finally:
        vars(args)["fsdp_plugin_args"] = given
        if launched is not None:
            os.environ[LAUNCHED] = launched


class Wrapped(nn.Module):
    """A sharded policy, in the place of the one that accelerate would wrap in DDP."""

    def __init__(self, policy: Policy, accelerator: Any):
        super().__init__()
        self.policy, self._accelerator = policy, accelerator

    def forward(self, rollouts: Rollouts) -> PolicyLogProbs:
        with self._accelerator.autocast():
            return self.policy.evaluate(rollouts)


def average_gradient(weight: nn.Parameter, processes: Processes) -> None:
    """The mean over processes of the gradient of a weight that is not sharded, in its place."""
    assert isinstance(weight.grad, Tensor)
    torch.distributed.all_reduce(weight.grad)
    weight.grad /= processes.count
