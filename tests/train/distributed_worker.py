"""One update of the tiny infilling trainer; run by torchrun or alone. Writes the new weights and the world size."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from test_trainer import ROWS, make_trainer, weights

from reference import tiny_lm, tiny_tokenizer

output, prompts_per_process = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
trainer = make_trainer(
    tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False),
    output / "run",
    rows=ROWS[:4],
    max_steps=1,
    warmup_steps=0,
    replay_ratio=0.0,
    per_device_train_batch_size=prompts_per_process,
    max_grad_norm=0.0,
    optim="sgd",
    objective=sys.argv[3],
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({"world": trainer.args.world_size, "weights": weights(trainer)}, output / "result.pt")
