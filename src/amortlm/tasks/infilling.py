"""Story infilling (Hu et al. 2024, section 4.3): the missing fourth sentence of a five-sentence story.

x = sentences 1 to 3, y = sentence 5, z = sentence 4; R(z) = p(z y | x), so q samples p(z | x, y).
"""

from __future__ import annotations

from pathlib import Path

from amortlm.tasks.spec import RunSpec

SPEC = RunSpec(
    # The ending, then the beginning as a document of its own: the model continues what it read last.
    prompt="{y}</s><s>{x}",
    target=[{"log_prob": {"of": "{z} {y}", "given": "{x}"}}],
    support={"stop": ".", "min_tokens": 3, "max_tokens": 20},
    data=str(Path(__file__).parent / "stories.jsonl"),
    config={
        "max_steps": 100,
        "num_samples": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
    },
)
