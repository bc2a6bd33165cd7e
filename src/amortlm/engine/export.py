"""The weights of a policy for programs that hold the frozen model themselves: LoRA alone, or all weights with any
adapter merged in."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from amortlm.engine.quantised import is_quantised
from amortlm.engine.shards import shards_of
from amortlm.errors import ConfigError

# Settings of LoRA that others than peft do not know, or understand otherwise.
NOT_PLAIN = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
)
MERGE = "start it with --weights merged"  # the remedy


def plain_lora(model: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config) of the LoRA in a model made by `trainable_copy`, as the two files of a PEFT folder hold them,
    with these trained weights: for programs that add it to the frozen model themselves.

    Raises ConfigError for what is more than LoRA of linear layers with one rank and scale."""
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"] if hasattr(model, "peft_config") else None
    if config is None or config.peft_type.value != "LORA":
        kind = "a full copy" if config is None else f"a {config.peft_type.value} adapter"
        raise ConfigError(
            f"a server of completions loads LoRA alone, not {kind}: {MERGE}, train LoRA, or draw locally"
        )
    others = [name for name in NOT_PLAIN if getattr(config, name, None)]
    if others or getattr(model, "initial", None):
        what = others[0] if others else f"init_lora_weights={config.init_lora_weights!r}"
        raise ConfigError(
            f"a server of completions cannot load LoRA with {what}: {MERGE}, leave it out of the LoraConfig, or draw "
            "locally"
        )
    tensors = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    odd = [
        k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight")) or k.startswith(f"{head}.")
    ]
    if odd:
        raise ConfigError(
            f"a server of completions loads LoRA of linear layers inside the model alone, not {odd[0]}: "
            f"{MERGE}, give a LoraConfig with target_modules='all-linear', or draw locally"
        )
    modules = {k.split(".lora_")[0].rsplit(".", 1)[-1] for k in tensors}
    own = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    return tensors, {"peft_type": "LORA", "bias": "none", "target_modules": sorted(modules), **own}


@torch.no_grad()
def merged_file(model: Any, original: Any, dtype: torch.dtype, tied: bool) -> bytes:
    """The weights of a model made by `trainable_copy`, as safetensors, by the names that checkpoints of `original`, the
    frozen model, have. Adapters are merged in float32, and all is cast to `dtype` then.

    tied: who reads it uses the input embeddings as output head. Raises ConfigError for models that cannot be merged,
    and for head and embeddings that the adapter made different where one stands for both."""
    if shards_of(model) is not None:
        raise ConfigError(
            "merged weights of a sharded model are in no process whole: train plain LoRA, which servers load as an "
            "adapter, or draw locally"
        )
    if is_quantised(original):
        raise ConfigError(
            "an adapter cannot be merged into a quantised model exactly: load it with dtype=torch.bfloat16"
        )
    state = {name: _cast(x, dtype) for name, x in _state(model).items()}
    head, embedding = (f"{_name(original, m)}.weight" for m in _ends(original))
    if tied and not torch.equal(state.pop(head), state[embedding]):
        raise ConfigError(
            "the adapter makes the head of the model differ from its embeddings, and the server has one tensor for "
            "both: start it with --untied, or leave head and embeddings out of the adapter"
        )
    for name in original._keys_to_ignore_on_save or ():
        state.pop(name, None)
    # The names in a file may differ from those in the model (for example those of the head of GPT-NeoX).
    return save(revert_weight_conversion(original, state))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, in a storage of its own: a file has none that is shared."""
    kind = dtype if x.is_floating_point() else x.dtype
    return x.to("cpu", kind, copy=True, memory_format=torch.contiguous_format)


def _state(model: Any) -> dict[str, Tensor]:
    """The model's state with merged adapters: in float32 where there was one."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    state = base.state_dict()
    for name, module in list(_adapted(base)):
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": x for key, x in _merged(module).state_dict().items()}
    return state


def _adapted(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, module) of what peft has put in the place of the model's own modules."""
    for name, child in module.named_children():
        if hasattr(child, "unload_and_optionally_merge_module") or hasattr(child, "base_layer"):
            yield prefix + name, child
        else:
            yield from _adapted(child, f"{prefix}{name}.")


def _merged(module: Any) -> nn.Module:
    """The plain module that does what an adapted one does, in float32. One after the other: a second model need not
    fit into memory."""
    own = copy.deepcopy(module).float()
    try:
        if hasattr(own, "unload_and_optionally_merge_module"):
            return own.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        own.merge()
        return own.get_base_layer()
    except (RuntimeError, ValueError, NotImplementedError) as e:
        raise ConfigError(f"peft cannot merge this adapter ({e}): train another, or draw locally") from e


def _ends(model: Any) -> tuple[nn.Module, nn.Module]:
    """(output head, input embeddings)."""
    return model.get_output_embeddings(), model.get_input_embeddings()


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)
