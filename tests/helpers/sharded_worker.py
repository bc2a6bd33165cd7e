"""A tiny trainer on rows of very uneven length, as one of several processes, with models that are sharded or whole.
Arguments: output folder, prompts per process, "sharded", "launched" (sharded by the launcher's settings) or "whole", and
what to do:

updates      one update with each of several settings; writes the new weights, and draws from before
run          8 updates with diagnosis and checkpoints; "resume" goes on from the last checkpoint
dies, late   the same, but at update 6 process 1 is killed, or sleeps
full, full-resume   as run and resume, with all weights trained
refusals     writes the errors for settings that cannot be had
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from reference import tiny_lm, tiny_tokenizer
from trainers import Accident, make_trainer

from amortlm import GFNTrainer, LanguageModel, Support
from amortlm.engine.adapter import default_lora
from amortlm.engine.shards import Shards
from amortlm.errors import ConfigError

WORDS = ("a", "b", "c", "d")
ROWS = [
    {"x": " ".join(WORDS[(i * 7 + k * k) % 4] for k in range(length)), "y": f" {WORDS[i]}"}
    for i, length in enumerate((1, 24, 3, 12))
]
UPDATES: dict[str, dict[str, Any]] = {
    "lora": {"objective": "subtb"},
    "full": {"objective": "vargrad", "adapter": "full"},
    "log_z": {"objective": {"tb": {"log_z": "learned"}}, "max_grad_norm": 1e-2},
    "checkpointing": {"objective": "vargrad", "activation_checkpointing": True},
    "accumulated": {"objective": "vargrad", "gradient_accumulation_steps": 2},
    "guided": {
        "behaviour": {"prior": 0.5},
        "support": Support(stop=".", max_tokens=4, allowed_tokens=("a", "t"), pattern="a.*t|t"),
    },
    "corrected": {"behaviour": {"corrected": 0.5}, "corrected_method": "smc", "corrected_particles": 8},
}
REFUSED: dict[str, dict[str, Any]] = {
    "version": {"fsdp_config": {"version": 1}},
    "reshard": {"fsdp_config": {"reshard_after_forward": False}},
    "offload": {"fsdp": "full_shard offload"},
    "checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
    "size": {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}},
    "class": {"fsdp_config": {"transformer_layer_cls_to_wrap": ["Layer"]}},
    "pissa": {"adapter": LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")},
}


def model(tied: bool = False) -> LanguageModel:
    return tiny_lm("llama", tiny_tokenizer(add_bos=True), tied)


def trainer(lm: LanguageModel, folder: Path, **settings: Any) -> GFNTrainer:
    bound = 10 if what == "late" else 100
    own = {"per_device_train_batch_size": prompts, "ddp_timeout": bound, "adapter": default_lora(4)}
    if layout == "sharded":
        own["fsdp"] = True
    own["support"] = Support(stop=".", min_tokens=1, max_tokens=6)
    return make_trainer(lm, folder, rows=ROWS, **own | settings)


def updates() -> None:
    found: dict[str, Any] = {}
    joins = count_joins()
    once = {
        "max_steps": 1,
        "warmup_steps": 0,
        "behaviour": {"tempered": 0.5},
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    for name, settings in UPDATES.items():
        if name == "accumulated":
            settings = {**settings, "per_device_train_batch_size": prompts // 2}
        done = trainer(model(tied=name == "full"), output / name, **once | settings)
        # Each process draws for its own rows: one has more passes to make than the other.
        drawn = done.processes.share(lambda row, t=done: t.posterior.sample(row, 8, seed=3), ROWS)
        found[f"{name}.texts"] = [sample.text for samples in drawn for sample in samples]
        found[f"{name}.logs"] = torch.tensor([(s.log_q, s.log_reward) for samples in drawn for s in samples])
        done.train()
        weights = [x.flatten() for x in done.policy.weights().values()]
        found[name] = torch.cat([*weights, *([] if done.log_z is None else [done.log_z.values])])
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in done.policy.model.parameters())
        found[f"{name}.held"] = held / sum(p.numel() for p in done.policy.model.parameters())
    found["joined"] = sum(done.processes.gather(len(joins)))
    if done.is_world_process_zero():
        torch.save(found, output / "result.pt")


def count_joins() -> list[int]:
    """A list that gets a 1 for each pass that this process makes for others."""
    joins, join = [], Shards._join
    Shards._join = lambda shards, number: (joins.append(1), join(shards, number))[1]  # type: ignore[method-assign]
    return joins


def run(kind: str) -> None:
    settings = {"logging_steps": 2, "diagnose_steps": 3, "save_strategy": "steps", "save_steps": 2}
    if kind.startswith("full"):
        settings["adapter"] = "full"
    going = trainer(
        model(),
        output,
        max_steps=8,
        behaviour={"replay": 0.5, "tempered": 0.25},
        stop_at_gap=1e-6,
        **settings,
    )
    if kind in ("dies", "late"):
        going.add_callback(Accident(kind, 6))
    going.train(resume_from_checkpoint=kind.endswith("resume") or None)


def refusals() -> None:
    found = {
        name: error(lambda s=settings: trainer(model(), output / "x", **s))
        for name, settings in REFUSED.items()
    }
    other = model()
    with torch.no_grad():
        other.model.model.norm.weight += int(os.environ["RANK"])
    found["weights"] = error(lambda: trainer(other, output / "x"))
    lm = model()
    trainer(lm, output / "x")
    found["twice"] = error(lambda: trainer(lm, output / "x"))
    if os.environ["RANK"] == "0":
        (output / "refusals.json").write_text(json.dumps(found), encoding="utf-8")


def error(make: Callable[[], object]) -> str:
    try:
        make()
    except ConfigError as e:
        return str(e)
    return "none"


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, prompts, layout, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    {"updates": updates, "refusals": refusals}.get(what, lambda: run(what))()
