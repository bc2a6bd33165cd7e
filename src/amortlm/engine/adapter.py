"""Trainable copies of a frozen model: an adapter on shared weights, or all weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor, nn

from amortlm.engine.quantised import is_quantised, states
from amortlm.engine.shards import original_class, put, shards_of, whole_state
from amortlm.errors import AmortLMError, CheckpointError, ConfigError
from amortlm.files import follow_umask

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from amortlm.engine.model import CausalLM

FULL = "full"
WEIGHTS = "adapter_model.safetensors"
DEFAULT_RANK = 64  # Hu et al. 2024: r = 64, alpha = 16 on GPT-2 XL
INITIAL = (
    "adapter_initial.safetensors"  # initial weights of a LoRA that starts with a part of the frozen weights
)
# The adapters of peft that change modules one by one: then log q of a token depends only on the tokens before it, with
# a cache as without. This is not so for virtual tokens, experts chosen by the text, and noise.
KINDS = (
    *(
        "LORA",
        "ADALORA",
        "IA3",
        "LOHA",
        "LOKR",
        "OFT",
        "BOFT",
        "HRA",
        "VERA",
        "RANDLORA",
        "FOURIERFT",
        "VBLORA",
    ),
    *("LN_TUNING", "TRAINABLE_TOKENS", "MISS", "C3A", "ROAD", "SHIRA", "DELORA", "WAVEFT"),
)
# Settings of LoRA that start at a token of the text, mix adapters by the text, or draw noise.
INEXACT = ("alora_invocation_tokens", "arrow_config", "monteclora_config")
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # peft refuses their out_proj
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "mica", "eva")  # do not change the frozen weights


def default_lora(rank: int = DEFAULT_RANK) -> LoraConfig:
    """LoRA on every linear layer except the output head. Dropout is 0: with dropout, the sampling policy and the
    trained policy would differ. Raises ConfigError for a rank below 1."""
    if isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{rank!r} is not a rank of an adapter: give a number of at least 1")
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def trainable_copy(lm: CausalLM, adapter: PeftConfig | int | str | Path | None) -> Any:
    """The model with an adapter (a PEFT config, the rank of a LoRA, the folder of a saved adapter, None for the default
    LoRA), or a full copy ("full"). Trained tensors require gradients.

    `lm` never changes. Tensors that the adapter trains, changes or is merged into are copies; all others are shared
    with `lm`. To find them, any adapter except plain LoRA needs the memory of a second model for a moment. Raises
    ConfigError for an adapter that is not exact or does not fit the model, CheckpointError for a folder that cannot be
    read."""
    if adapter == FULL:
        return _full_copy(lm)
    if isinstance(adapter, int):
        adapter = default_lora(adapter)
    folder = Path(adapter) if isinstance(adapter, str | Path) else None
    config: Any = (
        copy.deepcopy(adapter or default_lora()) if folder is None else _saved_config(folder, lm.model)
    )
    _check(config, lm)
    initial = None if folder is None else _load_initial(folder)
    init = getattr(config, "init_lora_weights", True)
    if initial is not None:
        config.init_lora_weights = True
    _leave_out_routers(config, lm.model)

    plain = is_plain(config)
    pairs = [(p, p if plain else copy.deepcopy(p)) for p in lm.model.parameters()]
    shared = copy.deepcopy(lm.model, {id(p): q for p, q in [*pairs, *((s, s) for s in states(lm.model))]})
    # The name that peft writes into the saved adapter and its card: a hub name, but not a path of this machine.
    name = Path(lm.name).name if Path(lm.name).is_absolute() or Path(lm.name).is_dir() else lm.name
    shared.name_or_path = shared.config._name_or_path = name
    config.base_model_name_or_path = None  # peft fills it in
    try:
        model = _with_adapter(shared, config)
        _share(model, {id(q): p for p, q in pairs}, config)
        if initial is not None:
            _begin_from(model, initial)
            config.init_lora_weights = init  # for peft, when it loads the saved adapter
    except AmortLMError:
        raise
    except Exception as e:  # peft raises many types of errors for a config or weights that do not fit
        if folder is not None:
            raise CheckpointError(
                f"{folder}: the adapter belongs to another model ({e}); give the model that it was trained on"
            ) from e
        raise ConfigError(
            f"peft cannot put this {config.peft_type.value} adapter into {lm.name}: {e}\nGive a LoraConfig whose "
            "target_modules name layers that it can wrap, or 'full'"
        ) from e
    for layer in _layers(model):
        layer.merge = MethodType(_merge, layer)
    return model


def _full_copy(lm: CausalLM) -> Any:
    _check_packed(lm, None)
    return copy.deepcopy(lm.model).requires_grad_(True)


def save_weights(model: Any, folder: str | Path) -> None:
    """A PEFT adapter folder, or a full model folder, for `load_weights`. safetensors and JSON."""
    from safetensors.torch import save_file

    state = whole_state(model)
    if hasattr(model, "peft_config"):
        # The embeddings are those of the frozen model. Otherwise peft asks the hub whether they changed.
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (Path(folder) / INITIAL).unlink(missing_ok=True)  # a file of another adapter
        if initial := getattr(model, "initial", None):
            save_file(initial, str(Path(folder) / INITIAL))
    else:
        model.save_pretrained(str(folder), state_dict=state)
    follow_umask(*Path(folder).glob("*.safetensors"))


def load_weights(model: Any, is_full: bool, folder: str | Path) -> None:
    """Load what `save_weights` wrote into a model made by `trainable_copy`.

    Raises CheckpointError if the weights do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = "model.safetensors" if is_full else WEIGHTS
    try:
        if is_full:
            # Loaded by transformers, which renames weights on disk (for example the head of GPT-NeoX).
            saved, info = original_class(model).from_pretrained(
                str(folder),
                config=copy.deepcopy(model.config),  # of the given model, not the config in the folder
                dtype=model.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            if info["missing_keys"]:
                raise ValueError(f"missing {sorted(info['missing_keys'])[:3]}")
            _load_state(model, saved.state_dict())
        else:
            weights = load_file(str(Path(folder) / name))
            initial = _load_initial(Path(folder))
            if initial is not None:
                _begin_from(model, initial)
            _load_adapter(model, weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _unreadable(folder, name, e) from e


def _load_state(model: Any, state: Mapping[str, Tensor]) -> None:
    if shards_of(model) is None:
        model.load_state_dict(state)
        return
    for name, own in model.state_dict().items():
        put(own, state[name])


@contextmanager
@torch.no_grad()
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the trained tensors of the model have these values."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    compares = shards_of(model) is None  # this process has only a part of each
    kept = [name for name, p in own.items() if compares and torch.equal(p, weights[name].to(p))]
    changed = {name: p.clone() for name, p in own.items() if name not in kept}
    try:
        for name in changed:
            put(own[name], weights[name])
        yield
    finally:
        for name, before in changed.items():
            own[name].copy_(before)


def _saved_config(folder: Path, model: Any) -> Any:
    """The config in adapter_config.json, for this model. Entries that name other models, modules to import or files are
    ignored. Raises CheckpointError."""
    from peft import PeftConfig

    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}, not a mapping")
        if saved.get("megatron_config"):
            raise ValueError("megatron_config names a module, which is not imported")
        for key in ("auto_mapping", "base_model_name_or_path", "revision", "runtime_config"):
            saved.pop(key, None)
        _check_ranks(saved, folder)
        config = PeftConfig.from_peft_type(**saved)
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type} is not an adapter of weights")
        for key in ("target_modules", "exclude_modules"):
            pattern = getattr(config, key, None)
            if isinstance(pattern, str) and pattern != "all-linear":
                setattr(config, key, _matching(pattern, model))
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key, None) or {}:
                _matching(pattern, model)
    except CheckpointError:
        raise
    except Exception as e:  # peft raises many types of errors for values of the wrong type
        raise CheckpointError(
            f"{folder}: cannot read adapter_config.json ({type(e).__name__}: {e}); the save is incomplete or damaged"
        ) from e
    config.inference_mode = False
    return config


def _check_ranks(saved: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for a rank larger than any dimension of the saved weights: it would only use up memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as weights:
            names = weights.keys()
            largest = max((max(weights.get_slice(n).get_shape(), default=0) for n in names), default=0)
    except (OSError, SafetensorError) as e:
        raise _unreadable(folder, WEIGHTS, e) from e
    for rank in (saved.get("r", 0), *(saved.get("rank_pattern") or {}).values()):
        if rank > largest:
            raise ValueError(f"rank {rank} is more than the largest dimension of the weights, {largest}")


def _unreadable(folder: str | Path, name: str, why: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: cannot read {name} ({why}); the save is incomplete or of another model: resume from an earlier "
        "checkpoint"
    )


def _matching(pattern: str, model: Any) -> list[str]:
    """The modules whose whole name matches the pattern. Raises TimeoutError if a match takes more than a second."""
    return [name for name, _ in model.named_modules() if regex.fullmatch(pattern, name, timeout=1)]


def _check(config: Any, lm: CausalLM) -> None:
    """Raise ConfigError for an adapter that is not exact, or not for this model; set dropout to 0 and the task to
    causal LM."""
    kind = getattr(config, "peft_type", None)
    if kind is None:
        raise ConfigError(
            f"{config!r} is not an adapter: give a LoraConfig, a rank, a folder with a saved adapter, or 'full'"
        )
    if kind.value not in KINDS:
        raise ConfigError(
            f"a {kind.value} adapter is not supported: its log q would depend on how a text is divided into passes, or "
            f"on chance; use LoRA, or one of {', '.join(KINDS[1:])}"
        )
    inexact = [name for name in INEXACT if getattr(config, name, None)]
    if inexact or getattr(config, "init_lora_weights", None) == "loftq":
        raise ConfigError(
            f"LoraConfig with {inexact[0] if inexact else 'loftq'} is not supported: q would not be exact; leave it out"
        )
    _check_packed(lm, config)
    for field in fields(config):
        if "dropout" in field.name:
            setattr(config, field.name, 0.0)
    config.task_type = "CAUSAL_LM"


def _leave_out_routers(config: Any, model: nn.Module) -> None:
    """Exclude from "all-linear" the subclasses of nn.Linear that do not compute a linear map (for example a router that
    returns several tensors), because an adapter would call them as linear layers. Also exclude the layers of Mamba that
    peft refuses."""
    if str(getattr(config, "target_modules", None)).lower() != "all-linear" or isinstance(
        config.exclude_modules, str
    ):
        return
    kinds: dict[type, bool] = {}  # the model's own subclasses of nn.Linear: are they linear?
    own = []
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind.__module__ == type(model).__module__:
            if kind not in kinds:
                kinds[kind] = _is_linear(module)
            own += [] if kinds[kind] else [name]
    if getattr(model.config, "model_type", None) in MAMBAS:
        own.append("out_proj")
    if own:
        config.exclude_modules = [*(config.exclude_modules or []), *own]


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    x = torch.linspace(-1, 1, 2 * module.in_features).to(module.weight).view(2, -1)
    try:
        out = module(x)
    except Exception:  # it needs other inputs than a linear layer
        return False
    expected = nn.functional.linear(x, module.weight, module.bias)
    return (
        isinstance(out, torch.Tensor)
        and out.shape == expected.shape
        and torch.allclose(out, expected, atol=1e-2)
    )


def _check_packed(lm: CausalLM, config: Any) -> None:
    """Raise ConfigError for an adapter (None: a full copy) that would train, change or copy packed weights."""
    if is_quantised(lm.model) and (config is None or not is_plain(config)):
        raise ConfigError(
            f"{lm.name} is quantised: train plain LoRA on it (no bias, no modules_to_save, an init_lora_weights that "
            "does not change the model's weights), not a full copy, or load it with dtype=torch.bfloat16"
        )


def is_plain(config: Any) -> bool:
    """Is it LoRA that neither trains nor changes a tensor of the model? Then all tensors can be shared at once."""
    others = ("modules_to_save", "trainable_token_indices", "velora_config", "kasa_config", "lora_ga_config")
    return (
        config.peft_type.value == "LORA"
        and config.bias == "none"
        and config.init_lora_weights in PLAIN_INITS
        and not any(getattr(config, name, None) for name in others)
    )


def _with_adapter(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft reads a renamed attribute of transformers, and sets fan_in_fan_out of GPT-2's layers itself.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        return get_peft_model(model, config)


def _share(model: Any, originals: dict[int, nn.Parameter], config: Any) -> None:
    """Replace the copies that the adapter did not change by the frozen model's tensors. originals: id of a copy -> the
    original.

    If LoRA moved a part of the frozen weights into its own (PiSSA, OLoRA, ...), `model.initial` keeps these weights."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            original = originals.get(id(p)) if p is not None else None
            if p is None or original is None or p.requires_grad:
                continue
            if p is not original and not torch.equal(p, original):
                moved[id(original)] = original
            module._parameters[name] = original
    if not moved:
        return
    lora = [layer for layer in _layers(model) if "lora_A" in dict(layer.named_children())]
    if moved.keys() - {id(layer.get_base_layer().weight) for layer in lora}:
        raise ConfigError(
            f"this {config.peft_type.value} adapter changes weights of the model in a way that cannot be saved with "
            "it; use LoRA"
        )
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    _begin_from(model, {k: v.detach().clone().contiguous() for k, v in state.items()})


def _begin_from(model: Any, initial: dict[str, Tensor]) -> None:
    """Load the adapter weights `initial`, and subtract their contribution from the frozen weights, so that q equals p
    with these weights."""
    _load_adapter(model, initial)
    for layer in _layers(model):
        if "lora_A" not in dict(layer.named_children()) or not layer.lora_A:
            continue
        base = layer.get_base_layer()
        if not hasattr(base, "original"):
            base.original = (base.weight,)  # in a tuple, so that the module does not train or save it
        with torch.no_grad():
            rest = base.original[0] - layer.get_delta_weight(layer.active_adapters[0])
        base.weight = nn.Parameter(rest.to(base.original[0].dtype), requires_grad=False)
    model.initial = initial


def _load_adapter(model: Any, weights: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if odd := own.keys() ^ weights.keys():
        raise ValueError(f"missing or unexpected {sorted(odd)[:3]}")
    if shards_of(model) is None:
        set_peft_model_state_dict(model, weights)
        return
    for name, p in own.items():
        put(p, weights[name])


def _load_initial(folder: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / INITIAL).exists():
        return None
    try:
        return load_file(str(folder / INITIAL))
    except (OSError, SafetensorError) as e:
        raise _unreadable(folder, INITIAL, e) from e


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _merge(layer: Any, *args: Any, **kwargs: Any) -> None:
    """The merge of peft, which writes into the model's weights, applied to copies of them."""
    base = layer.get_base_layer()
    if is_quantised(base):
        raise ConfigError(
            "an adapter cannot be merged into a quantised model exactly: load it with dtype=torch.bfloat16"
        )
    for name, p in list(base._parameters.items()):
        if p is not None:
            base._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    type(layer).merge(layer, *args, **kwargs)
