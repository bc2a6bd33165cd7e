"""Trainable copies of a frozen model: LoRA on shared weights, or all weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

    from amortlm.language_model import LanguageModel

FULL = "full"
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
    config = _saved_config(adapter) if isinstance(adapter, str | Path) else adapter or default_lora()
    with warnings.catch_warnings():
        # peft reads a renamed attribute of transformers, and sets fan_in_fan_out of GPT-2's layers itself.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        try:
            return get_peft_model(shared, config)
        except ValueError as e:
            if not isinstance(adapter, str | Path):
                raise
            raise CheckpointError(
                f"{adapter}: the adapter is of another model ({e}); give the model it is of"
            ) from e


def load_weights(model: Any, is_full: bool, folder: str | Path) -> None:
    """Load what `model.save_pretrained` wrote into a model made by `trainable_copy`.

    Raises CheckpointError if the weights do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = "model.safetensors" if is_full else "adapter_model.safetensors"
    try:
        if is_full:
            # By transformers, which renames weights on disk (the head of GPT-NeoX, for one).
            saved, info = type(model).from_pretrained(
                str(folder), dtype=model.dtype, local_files_only=True, output_loading_info=True
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
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as e:
        raise CheckpointError(
            f"{folder}: cannot read {name} ({e}); the save was cut short or is of another model: "
            "resume from an earlier checkpoint"
        ) from e


def _saved_config(folder: str | Path) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"{folder}: cannot read adapter_config.json ({e}); the save is incomplete"
        ) from e
    config.inference_mode = False
    return config
