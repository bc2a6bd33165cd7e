"""A run and its folder: what makes a run the one that it is, and what of it may be gone on from or deleted.

The identity of a run is written to run.json, in its folder before the first step and in each of its checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from amortlm.diagnostics import certificate
from amortlm.engine.model import CausalLM
from amortlm.errors import CheckpointError, ConfigError
from amortlm.files import write_text
from amortlm.train import checkpoints, outcome
from amortlm.train.checkpoints import START_OVER
from amortlm.types import Row, row_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from amortlm.policy.policy import Policy
    from amortlm.targets.base import Target
    from amortlm.train.config import GFNConfig

FILE, LOCK = "run.json", ".lock"
POSTERIOR = "posterior.json"
# What a run leaves in its folder beside checkpoints, and the weights of a posterior. The rest is not ours to delete.
NOTES = (FILE, certificate.FILE, checkpoints.STATE, "samples.jsonl", "training_args.json")
WEIGHTS = (
    "adapter_model*.safetensors",
    "adapter_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
# Settings that change what is written, shown or how fast, but not what is learned: names, or their beginnings.
FREE = (
    *(
        "output_dir",
        "resume_from_checkpoint",
        "do_",
        "logging_",
        "log_level",
        "log_on_each_node",
        "disable_tqdm",
    ),
    *("report_to", "run_name", "project", "trackio_", "save_", "push_to_hub", "hub_", "eval_", "enable_jit_"),
    *(
        "per_device_eval_",
        "prediction_loss_only",
        "batch_eval_metrics",
        "include_",
        "skip_memory_metrics",
        "debug",
    ),
    *("use_cpu", "local_rank", "ddp_", "torch_", "activation_checkpointing", "gradient_checkpointing"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
)
PROBES = 64  # values of each tensor that tell one model from another
SHOWN = 3  # differences named in an error


# What a run is


def identity(
    policy: Policy,
    target: Target,
    rows: Sequence[Row],
    args: GFNConfig,
    *,
    start: str | None = None,
    gold: Any = None,
) -> dict[str, Any]:
    """What the result of a run depends on, as JSON: model, target, prompt, support, adapter, data and settings.

    start: name of the weights that an adapter starts from, where it was saved before; gold: completions that the
    buffer starts with. Functions count by name, and library versions and devices not at all.
    """
    lm = policy.lm
    try:
        stated: Any = target.to_spec()
    except ConfigError:  # a function without an import path
        stated = repr(target)
    models = [t.lm for _, t in target.terms if isinstance(t.lm, CausalLM) and t.lm is not lm]
    settings = {k: v for k, v in args.to_dict().items() if not k.startswith(FREE)}
    if not args.stop_at_gap:
        del settings["diagnose_steps"]
    if args.data_seed == args.seed:  # the default
        del settings["data_seed"]
    found = {
        "model": lm.name,
        "the model's weights": name_of(lm.model.named_parameters()),
        "the tokenizer": _hash([sorted(lm.tokenizer.get_vocab().items()), lm.tokenizer.chat_template]),
        "the weights of the target's model": [name_of(other.model.named_parameters()) for other in models],
        "target": stated,
        "prompt": policy.prompt.source,
        "support": _stated_support(policy),
        "adapter": stated_adapter(policy.model, policy.is_full),
        "the adapter's first weights": start,
        "the data": _hash([row_key(row) for row in rows]),
        "the gold completions": None if gold is None else _hash(gold),
        "the number of processes": args.world_size,
        "settings": settings,
    }
    return as_json(found)


def name_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, types, shapes and a few values of each: the same on every device, cheap for billions."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        count = min(PROBES, len(flat))
        places = (
            torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
        )  # in floats the last would be missed
        values = flat[places.to(flat.device)].double().cpu().numpy().tobytes()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + values)
    return f"sha256:{found.hexdigest()}"


def as_json(stated: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back."""
    return json.loads(json.dumps(stated, default=_plain))


def _hash(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, default=_plain).encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _stated_support(policy: Policy) -> Any:
    try:
        return policy.support_spec.to_dict()
    except ConfigError:  # a tool that cannot be saved by name
        return repr(policy.support_spec)


def stated_adapter(model: Any, is_full: bool) -> Any:
    if is_full:
        return "full"
    config = model.peft_config["default"].to_dict()
    where = (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "runtime_config",
    )
    return {k: v for k, v in config.items() if k not in where}


def difference(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In which ways two identities differ: "seed was 42, is 7"; None if they do not."""
    old, new = _flat(was), _flat(now)
    if old.get("the model's weights") == new.get("the model's weights"):
        old["model"] = new["model"]  # it has moved
    found = []
    for name in dict.fromkeys([*new, *old]):
        a, b = old.get(name), new.get(name)
        if a != b:
            hashed = "sha256:" in f"{a} {b}"
            found.append(f"{name} changed" if hashed else f"{name} was {_short(a)}, is {_short(b)}")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more if found else None


def _flat(stated: dict[str, Any]) -> dict[str, Any]:
    """Settings and the parts of support and adapter stand alone."""
    out = {k: v for k, v in stated.items() if not isinstance(v, dict)}
    for name in ("settings", "support", "adapter", "m_step", "p"):
        if isinstance(stated.get(name), dict):
            prefix = "" if name == "settings" else f"{name}."
            out |= {f"{prefix}{k}": v for k, v in stated[name].items()}
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"


# Where it is


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run in a folder at a time. A lock dies with its process. Raises CheckpointError where it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another process is training in {folder}: wait for it, or give another output folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def prepare(folder: Path, stated: dict[str, Any], resume: str | Path | bool, overwrite: bool) -> Path | None:
    """What to go on from: a checkpoint of this very run, its folder where it is finished, None to start.

    Claims the folder for it. Raises CheckpointError where that would take or overwrite what is another run's.
    """
    if resume and overwrite:
        raise ConfigError(
            "resume_from_checkpoint (--resume) and overwrite_output_dir (--overwrite): give one of them"
        )
    if resume is False:
        if not overwrite:
            refuse_used(folder)
        _clear(folder)
        write(folder, stated)
        return None
    if (folder / FILE).exists():
        check(folder, stated)
        if resume is True and is_finished(folder):
            return folder
    found = checkpoints.find(resume, folder)
    check(found, stated)
    if not (folder / FILE).exists() and found.parent.resolve() != folder.resolve():
        refuse_used(folder)
    write(folder, stated)
    return found


def refuse_used(folder: Path) -> None:
    """Raise CheckpointError where a folder holds a posterior, or checkpoints that were written to their end."""
    saved = any((p / checkpoints.STATE).exists() for p in checkpoints.begun(folder))
    if saved or (folder / POSTERIOR).exists():
        raise CheckpointError(
            f"{folder} holds a run already: go on with resume_from_checkpoint=True (--resume), {START_OVER}, which "
            "deletes it, or give another output folder"
        )


def can_resume(folder: Path) -> bool:
    """Is there a whole checkpoint, or a finished run?"""
    return is_finished(folder) or any(checkpoints.damage(p) is None for p in checkpoints.begun(folder))


def is_finished(folder: Path) -> bool:
    try:
        return bool(_read(folder)["finished"]) and (folder / POSTERIOR).exists()
    except CheckpointError:
        return False


def write(folder: Path, stated: dict[str, Any], finished: bool = False) -> None:
    write_text(folder / FILE, json.dumps({"finished": finished, "identity": stated}, indent=1) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(found["identity"], dict) and isinstance(found["finished"], bool):
            return found
        reason = "another layout"
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = str(e)
    raise CheckpointError(
        f"{folder} does not say which run it is of ({FILE}: {reason}), as in those of earlier versions; {START_OVER}"
    )


def check(folder: Path, stated: dict[str, Any]) -> None:
    """Raise CheckpointError where a folder or checkpoint is of another run."""
    found = difference(_read(folder)["identity"], stated)
    if found:
        raise CheckpointError(
            f"{folder} is of another run: {found}. Resume with the settings of that run, give another output folder, "
            f"or {START_OVER}"
        )


def _clear(folder: Path) -> None:
    """Leave nothing of an earlier run that could be taken for this one's."""
    for checkpoint in checkpoints.begun(folder):
        shutil.rmtree(checkpoint)
    weights = (*WEIGHTS, POSTERIOR) if (folder / POSTERIOR).exists() else ()
    for pattern in (*weights, *NOTES):
        for file in folder.glob(pattern):
            file.unlink()
    shutil.rmtree(folder / outcome.FOLDER, ignore_errors=True)
