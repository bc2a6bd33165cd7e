"""Trainable copies of a frozen model: LoRA on shared weights, or all weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from amortlm.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

    from amortlm.language_model import LanguageModel

FULL = "full"
WEIGHTS = "adapter_model.safetensors"
DEFAULT_RANK = 64  # Hu et al. 2024: r = 64, alpha = 16 on GPT-2 XL


def default_lora(rank: int = DEFAULT_RANK) -> LoraConfig:
    """LoRA on every linear layer but the output head. Dropout 0: with dropout, the policy that samples and
    the policy that is trained are not the same."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def trainable_copy(lm: LanguageModel, adapter: LoraConfig | str | Path | None) -> Any:
    """The model with LoRA on its own, frozen tensors (a config, a folder with one, None for the default), or a full
    copy ("full"); what trains requires gradients. `lm` and its module tree stay untouched."""
    if adapter == FULL:
        return copy.deepcopy(lm.model).requires_grad_(True)
    from peft import get_peft_model

    # A copy of the module tree whose parameters are the very tensors of the frozen model.
    memo: dict[int, Any] = {id(p): p for p in lm.model.parameters()}
    shared = copy.deepcopy(lm.model, memo)
    is_saved = isinstance(adapter, str | Path)
    config: Any = _saved_config(Path(str(adapter)), shared) if is_saved else adapter or default_lora()
    with warnings.catch_warnings():
        # peft reads a renamed attribute of transformers, and sets fan_in_fan_out of GPT-2's layers itself.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        try:
            return get_peft_model(shared, config)
        except Exception as e:
            if not is_saved:
                raise
            raise CheckpointError(
                f"{adapter}: the adapter is of another model ({e}); give the model it is of"
            ) from e


def load_weights(model: Any, is_full: bool, folder: str | Path) -> None:
    """Load what `model.save_pretrained` wrote into a model made by `trainable_copy`.

    Raises CheckpointError if the weights do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = "model.safetensors" if is_full else WEIGHTS
    try:
        if is_full:
            # By transformers, which renames weights on disk (the head of GPT-NeoX, for one).
            saved, info = type(model).from_pretrained(
                str(folder),
                config=copy.deepcopy(model.config),  # of the model given, whatever the folder says
                dtype=model.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            if info["missing_keys"]:
                raise ValueError(f"missing {sorted(info['missing_keys'])[:3]}")
            model.load_state_dict(saved.state_dict())
        else:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            weights = load_file(str(Path(folder) / name))
            odd = set(get_peft_model_state_dict(model)) ^ set(weights)
            if odd:
                raise ValueError(f"missing or unexpected {sorted(odd)[:3]}")
            set_peft_model_state_dict(model, weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _unreadable(folder, name, e) from e


def _saved_config(folder: Path, model: Any) -> Any:
    """adapter_config.json, for this model. What it says of other models, modules to import and files is left unread."""
    from peft import PeftConfig

    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError(f"a mapping is due, not {type(saved).__name__}")
        if saved.get("megatron_config"):
            raise ValueError("megatron_config names a module to import, which is not done")
        for key in ("auto_mapping", "base_model_name_or_path", "revision", "runtime_config"):
            saved.pop(key, None)
        _check_ranks(saved, folder)
        config = PeftConfig.from_peft_type(**saved)
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type} is no adapter of weights")
        for key in ("target_modules", "exclude_modules"):
            pattern = getattr(config, key, None)
            if isinstance(pattern, str) and pattern != "all-linear":
                setattr(config, key, _matching(pattern, model))
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key, None) or {}:
                _matching(pattern, model)
    except CheckpointError:
        raise
    except Exception as e:  # whatever peft makes of values of the wrong kind
        raise CheckpointError(
            f"{folder}: cannot read adapter_config.json ({type(e).__name__}: {e}); the save is incomplete or damaged"
        ) from e
    config.inference_mode = False
    return config


def _check_ranks(saved: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for a rank that the weights beside do not have: it would be memory, not an adapter."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as weights:
            names = weights.keys()
            largest = max((max(weights.get_slice(n).get_shape(), default=0) for n in names), default=0)
    except (OSError, SafetensorError) as e:
        raise _unreadable(folder, WEIGHTS, e) from e
    for rank in (saved.get("r", 0), *(saved.get("rank_pattern") or {}).values()):
        if rank > largest:
            raise ValueError(f"rank {rank}, where the largest dimension of the weights is {largest}")


def _unreadable(folder: str | Path, name: str, why: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: cannot read {name} ({why}); the save was cut short or is of another model: "
        "resume from an earlier checkpoint"
    )


def _matching(pattern: str, model: Any) -> list[str]:
    """The modules whose whole name matches; by an engine that gives up. Raises TimeoutError."""
    return [name for name, _ in model.named_modules() if regex.fullmatch(pattern, name, timeout=1)]
