"""A run and its folder: the identity of a run, and which folders may be resumed or deleted.

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
from amortlm.engine import quantised
from amortlm.engine.model import CausalLM
from amortlm.environment import environment
from amortlm.errors import CheckpointError, ConfigError
from amortlm.files import DIAGNOSIS, LOOKS, REPORT, RUN, write_text
from amortlm.train import checkpoints, outcome
from amortlm.train.checkpoints import START_OVER
from amortlm.types import Row, row_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from amortlm.policy.policy import Policy
    from amortlm.targets.base import Target
    from amortlm.train.config import GFNConfig

FILE, LOCK = RUN, ".lock"
POSTERIOR = "posterior.json"
# Files of a run besides checkpoints, and files with the weights of a posterior. No other files are deleted.
NOTES = (FILE, certificate.FILE, checkpoints.STATE, LOOKS, DIAGNOSIS, REPORT, "training_args.json")
WEIGHTS = (
    "adapter_model*.safetensors",
    "adapter_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
# Settings (names or prefixes of names) that change output, display or speed, but not the result of training.
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
    *(
        "rollout",
        "use_cpu",
        "local_rank",
        "ddp_",
        "torch_",
        "activation_checkpointing",
        "gradient_checkpointing",
    ),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
)
PROBES = 64  # values of each tensor that are hashed
SHOWN = 3  # differences named in an error


# The identity of a run


def identity(
    policy: Policy,
    target: Target,
    rows: Sequence[Row],
    args: GFNConfig,
    *,
    start: str | None = None,
    gold: Any = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Everything that the result of a run depends on, as JSON: model, target, prompt, support, adapter, data, settings.

    start: hash of the saved weights that an adapter starts from, if any. gold: initial completions of the buffer.
    weights: the hash of the model's weights, if they are sharded and so cannot be read. Functions are identified by
    name; library versions and devices do not count.
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
        "the model's weights": weights or name_of(lm.model.named_parameters()),
        "the tokenizer": _hash([sorted(lm.tokenizer.get_vocab().items()), lm.tokenizer.chat_template]),
        "the weights of the target's model": [name_of(other.model.named_parameters()) for other in models],
        "target": stated,
        "prompt": policy.prompt.source,
        "support": policy.support_spec.stated(),
        "adapter": stated_adapter(policy.model, policy.is_full),
        "the adapter's first weights": start,
        "the data": _hash([row_key(row) for row in rows]),
        "the gold completions": None if gold is None else _hash(gold),
        "the number of processes": args.world_size,
        "settings": settings,
    }
    if packing := quantised.settings(lm.model):  # the scales of packed weights are no parameters
        found["how the model is quantised"] = packing
    if weights is not None:
        found["the models are sharded"] = True
    return as_json(found)


def name_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the name, type, shape and a few values of each tensor: the same on every device, and cheap for billions
    of weights."""
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
    """The identity as it will be read from a file."""
    return json.loads(json.dumps(stated, default=_plain))


def _hash(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, default=_plain).encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


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
    """The differences of two identities in words: "seed was 42, is 7"; None if they are equal."""
    old, new = _flat(was), _flat(now)
    if old.get("the model's weights") == new.get("the model's weights"):
        old["model"] = new["model"]  # the same weights in another place
    found = []
    for name in dict.fromkeys([*new, *old]):
        a, b = old.get(name), new.get(name)
        if a != b:
            hashed = "sha256:" in f"{a} {b}"
            found.append(f"{name} changed" if hashed else f"{name} was {_short(a)}, is {_short(b)}")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more if found else None


def _flat(stated: dict[str, Any]) -> dict[str, Any]:
    """A flat mapping of an identity: settings by name, and parts of support and adapter with a prefix."""
    out = {k: v for k, v in stated.items() if not isinstance(v, dict)}
    for name in ("settings", "support", "adapter", "m_step", "p"):
        if isinstance(stated.get(name), dict):
            prefix = "" if name == "settings" else f"{name}."
            out |= {f"{prefix}{k}": v for k, v in stated[name].items()}
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:50]} ... {text[-45:]}"


# The folder of a run


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for one run at a time. The lock ends with its process. Raises CheckpointError if it is taken."""
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


def prepare(
    folder: Path,
    stated: dict[str, Any],
    resume: str | Path | bool,
    overwrite: bool,
    about: Mapping[str, Any] | None = None,
) -> Path | None:
    """Where to start: a checkpoint of this run; its folder if the run is finished; None for a new run.

    Writes the identity into the folder, and what is said about the run. Raises CheckpointError if the folder or the
    checkpoint is of another run, ConfigError for both resume and overwrite.
    """
    if resume and overwrite:
        raise ConfigError(
            "resume_from_checkpoint (--resume) and overwrite_output_dir (--overwrite): give one of them"
        )
    if resume is False:
        if not overwrite:
            refuse_used(folder)
        _clear(folder)
        write(folder, stated, about)
        return None
    if (folder / FILE).exists():
        check(folder, stated)
        if resume is True and is_finished(folder):
            return folder
    found = checkpoints.find(resume, folder)
    check(found, stated)
    if not (folder / FILE).exists() and found.parent.resolve() != folder.resolve():
        refuse_used(folder)
    write(folder, stated, about)
    return found


def refuse_used(folder: Path) -> None:
    """Raise CheckpointError if a folder holds a posterior, or checkpoints that were written completely."""
    saved = any((p / checkpoints.STATE).exists() for p in checkpoints.begun(folder))
    if saved or (folder / POSTERIOR).exists():
        raise CheckpointError(
            f"{folder} already holds a run: continue it with resume_from_checkpoint=True (--resume), {START_OVER}, "
            "which deletes it, or give another output folder"
        )


def can_resume(folder: Path) -> bool:
    """Does the folder hold a complete checkpoint, or a finished run?"""
    return is_finished(folder) or any(checkpoints.damage(p) is None for p in checkpoints.begun(folder))


def is_finished(folder: Path) -> bool:
    try:
        return bool(_read(folder)["finished"]) and (folder / POSTERIOR).exists()
    except CheckpointError:
        return False


def write(
    folder: Path, stated: dict[str, Any], about: Mapping[str, Any] | None = None, finished: bool = False
) -> None:
    """about: what readers of a report want to know beyond the identity (`about` below)."""
    text = json.dumps({"finished": finished, "identity": stated, "about": about}, indent=1)
    write_text(folder / FILE, text + "\n")


def about(policy: Policy, target: Target, rows: Sequence[Row], chosen: Sequence[str]) -> dict[str, Any]:
    """The posterior as its author wrote it, what was chosen for the author (sentences), and the machine."""
    name = policy.lm.name
    if name and Path(name).exists():
        name = Path(name).name  # a report may be shown to others
    return {
        "model": name,
        "target": repr(target),
        "prompt": policy.prompt.source,
        "support": repr(policy.support_spec),
        "rows": len(rows),
        "chosen": [*chosen],
        "environment": environment(),
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(found["identity"], dict) and isinstance(found["finished"], bool):
            return found
        reason = "another layout"
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = str(e)
    raise CheckpointError(
        f"{folder} does not state its run ({FILE}: {reason}); earlier versions did not write this file; {START_OVER}"
    )


def check(folder: Path, stated: dict[str, Any]) -> None:
    """Raise CheckpointError if a folder or checkpoint is of another run."""
    found = difference(_read(folder)["identity"], stated)
    if found:
        raise CheckpointError(
            f"{folder} is of another run: {found}. Resume with the settings of that run, give another output folder, "
            f"or {START_OVER}"
        )


def _clear(folder: Path) -> None:
    """Delete the files of an earlier run, so that none is taken for a file of this run."""
    for checkpoint in checkpoints.begun(folder):
        shutil.rmtree(checkpoint)
    weights = (*WEIGHTS, POSTERIOR) if (folder / POSTERIOR).exists() else ()
    for pattern in (*weights, *NOTES):
        for file in folder.glob(pattern):
            file.unlink()
    shutil.rmtree(folder / outcome.FOLDER, ignore_errors=True)
