"""A tiny trainer on rows of very uneven length, as one of several processes, with models sharded by FSDP2 or whole.
Arguments: output folder, prompts per process, "sharded" or "whole", and what to do:

updates      one update with each of several settings; writes the new weights, and draws made before
run          8 updates with diagnosis and checkpoints; "resume" goes on from the last checkpoint
dies, late   the same, but at update 6 process 1 is killed, or sleeps
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reference import tiny_lm, tiny_tokenizer
from trainers import make_trainer
from transformers import TrainerCallback

from amortlm import GFNTrainer, Support
from amortlm.engine.adapter import default_lora

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
    "accumulated": {"objective": "vargrad", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "corrected": {"behaviour": {"corrected": 0.5}, "corrected_method": "smc", "corrected_particles": 8},
}


class Accident(TrainerCallback):
    def __init__(self, kind: str):
        self.kind = kind

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and args.process_index == 1:
            if self.kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)


def trainer(folder: Path, tied: bool = False, **settings: Any) -> GFNTrainer:
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=tied)
    if sharded:
        settings["fsdp"] = True
    own = {"per_device_train_batch_size": prompts, "ddp_timeout": 10, "adapter": default_lora(4)}
    support = Support(stop=".", min_tokens=1, max_tokens=6)
    return make_trainer(lm, folder, rows=ROWS, support=support, **own | settings)


def updates() -> None:
    found: dict[str, Any] = {}
    once = {"max_steps": 1, "warmup_steps": 0, "behaviour": {"tempered": 0.5}, "max_grad_norm": 0.0, "optim": "sgd"}
    for name, settings in UPDATES.items():
        done = trainer(output / name, tied=name == "full", **once | settings)
        # As many passes as rows need: each process draws for others than its neighbour, and waits at the end.
        own = done.processes.share(lambda row, t=done: t.posterior.sample(row, 8, seed=3), ROWS)
        drawn = [(sample.text, sample.log_q, sample.log_reward) for samples in own for sample in samples]
        done.train()
        weights = {k: x.flatten() for k, x in done.policy.weights().items()}
        found[name] = torch.cat([*weights.values(), *([] if done.log_z is None else [done.log_z.values])])
        found[f"{name}.texts"] = [text for text, *_ in drawn]
        found[f"{name}.log"] = torch.tensor([numbers for _, *numbers in drawn])
        found["world"] = done.args.world_size
    if done.is_world_process_zero():
        torch.save(found, output / "result.pt")


def run(kind: str) -> None:
    settings = {"logging_steps": 2, "diagnose_steps": 3, "save_strategy": "steps", "save_steps": 2}
    adapter = "full" if kind.startswith("full") else default_lora(4)
    kind = kind.removeprefix("full-")
    going = trainer(
        output, max_steps=8, behaviour={"replay": 0.5, "tempered": 0.25}, adapter=adapter, stop_at_gap=1e-6, **settings
    )
    if kind in ("dies", "late"):
        going.add_callback(Accident(kind))
    going.train(resume_from_checkpoint=kind == "resume" or None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, prompts, sharded, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sharded", sys.argv[4]
    updates() if what == "updates" else run(what)
