"""The tiny infilling trainer as one of several processes. Arguments: output folder, prompts per process, what to do:

updates      one update with each of several settings; writes the new weights and the world size
run          64 updates with diagnosis, logging and checkpoints; "resume" goes on from the last checkpoint
dies, late   the same, but at update 47 process 1 is killed, or sleeps
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from reference import tiny_lm, tiny_tokenizer
from trainers import ROWS, Accident, make_trainer, watch, weights

from amortlm import GFNTrainer

UPDATES: dict[str, dict[str, Any]] = {
    "subtb": {"objective": "subtb"},
    "vargrad": {"objective": "vargrad"},
    "log_z": {"objective": {"tb": {"log_z": "learned"}}},
    "checkpointing": {"objective": "vargrad", "activation_checkpointing": True},
}


def trainer(folder: Path, **settings: Any) -> GFNTrainer:
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False)
    return make_trainer(
        lm, folder, rows=ROWS[:4], per_device_train_batch_size=prompts, ddp_timeout=10, **settings
    )


def updates() -> None:
    found: dict[str, Any] = {}
    once = {
        "max_steps": 1,
        "warmup_steps": 0,
        "behaviour": {"tempered": 0.5},
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    for name, settings in UPDATES.items():
        done = trainer(output / name, **once, **settings)
        done.train()
        found[name] = weights(done)
        world = done.args.world_size
    if done.is_world_process_zero():
        torch.save({"world": world, **found}, output / "result.pt")


def run(kind: str) -> None:
    settings = {"logging_steps": 5, "diagnose_steps": 25, "save_strategy": "steps", "save_steps": 15}
    going = trainer(
        output, max_steps=64, behaviour={"replay": 0.5, "tempered": 0.25}, stop_at_gap=1e-6, **settings
    )
    if kind in ("dies", "late"):
        going.add_callback(Accident(kind, 47))
    told, used = watch(going)
    going.train(resume_from_checkpoint=kind == "resume" or None)
    assert used.items() <= told.items(), "the rows of each process are known before they are needed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, prompts, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    updates() if what == "updates" else run(what)
