"""A run of the tiny infilling trainer that goes on from where it was, for whoever kills it. Says when it trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from reference import tiny_lm, tiny_tokenizer
from trainers import make_trainer
from transformers import TrainerCallback

from amortlm.train.run import can_resume


def say(what: str) -> None:
    """One process speaks for all: two that write at once would mix their lines."""
    if os.environ.get("RANK", "0") == "0":
        print(what, flush=True)


class Say(TrainerCallback):
    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        say("training")


folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
trainer = make_trainer(
    tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False),
    folder,
    max_steps=20,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=2,
    behaviour={"replay": 0.5, "tempered": 0.25},
    objective={"tb": {"log_z": "learned"}},
    per_device_train_batch_size=1 if "two" in sys.argv else 2,
    gradient_accumulation_steps=1,
)
trainer.add_callback(Say())
found = can_resume(folder) if "two" not in sys.argv else "resume" in sys.argv
trainer.train(resume_from_checkpoint=found, overwrite_output_dir=not found)
say("finished")
