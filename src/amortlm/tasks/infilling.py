"""Story infilling (Hu et al. 2024, section 4.3): the missing fourth sentence of a five-sentence story.

x = sentences 1 to 3, y = sentence 5, z = sentence 4; R(z) = p(z y | x), so q samples p(z | x, y).
"""

from __future__ import annotations

from pathlib import Path

from amortlm.tasks.spec import RunSpec, load_rows

STORIES = load_rows(Path(__file__).parent / "stories.jsonl")  # x, y, and gold: the fourth sentence as written
TRAINED = 12  # stories the posterior is amortised over
UNSEEN = STORIES[TRAINED:20]

SPEC = RunSpec(
    # The ending, then the beginning as a document of its own: the model continues what it read last.
    prompt="{y}</s><s>{x}",
    target=[{"log_prob": {"of": "{z} {y}", "given": "{x}"}}],
    support={"stop": ".", "min_tokens": 3, "max_tokens": 20},
    data=[dict(row) for row in STORIES[:TRAINED]],
    lora=32,
    config={
        "max_steps": 100,
        "num_samples": 12,
        "per_device_train_batch_size": 6,
        "subtb_states": 6,
        "learning_rate": 2e-3,
        "diagnose_steps": 0,
    },
)
