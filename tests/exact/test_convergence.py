"""Training reaches the exact posterior: total variation by enumeration on the embedded model.

Sixteen words, one to three of them: 4,368 completions. Before training TV is above 0.5, after it below 0.1.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Support, Target, default_lora, exact
from amortlm import constraint as c

WORDS = [
    " the",
    " a",
    " dog",
    " cat",
    " ran",
    " home",
    " saw",
    " was",
    " happy",
    " sad",
    " to",
    " and",
    " her",
    " his",
    " she",
    " found",
]
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=WORDS)
ROW = {"x": "Tom had a dog. One day the dog was lost.", "y": "Tom was happy to have his dog again."}
FAR, NEAR = 0.5, 0.1
LONG = pytest.mark.long


def targets(lm: LanguageModel) -> dict[str, Target]:
    prior = lm.log_prob("{z}", given="{x}")
    return {
        "infilling": lm.log_prob("{z} {y}", given="{x}"),
        "tempered": prior / 0.7,
        "contrastive": 1.5 * prior - 1.0 * lm.log_prob("{z}"),
        "constrained": prior + c.contains("cat"),
    }


def train(lm: LanguageModel, target: Target, objective: str, folder: Path, **settings: object) -> GFNTrainer:
    config = {
        "objective": objective,
        "max_steps": 200,
        "num_samples": 64,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "epsilon": 0.1,  # so that no mode depends on luck in the first updates
        "save_strategy": "no",
        "diagnose_steps": 0,
        "narrow_support": False,  # all distances are over one support
        **settings,
    }
    return GFNTrainer(
        lm,
        target=target,
        prompt="{x}",
        support=SUPPORT,
        train_dataset=[ROW],
        adapter=default_lora(16),
        args=GFNConfig(output_dir=str(folder), **config),
    )


def total_variation(trainer: GFNTrainer, truth: exact.ExactPosterior) -> float:
    return exact.distance(exact.policy_log_probs(trainer.policy, ROW), truth.log_p).total_variation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("infilling", "subtb"),
        ("tempered", "vargrad"),
        ("tempered", "alpha"),
        *(
            pytest.param(name, objective, marks=LONG)
            for name, objective in (
                ("infilling", "vargrad"),
                ("tempered", "subtb"),
                ("tempered", "prefix_tb"),
                *itertools.product(("contrastive", "constrained"), ("subtb", "vargrad")),
            )
        ),
    ],
)
def test_training_reaches_the_posterior(
    embedded: LanguageModel, tmp_path: Path, name: str, objective: str
) -> None:
    """And stays far from that of another target (the control)."""
    known = targets(embedded)
    truth, other = (
        exact.enumerate_posterior(known[each], SUPPORT.bind(embedded), ROW)
        for each in (name, "infilling" if name == "tempered" else "tempered")
    )
    steps = 100 if name == "contrastive" else 200  # its two terms make an update twice as long
    trainer = train(embedded, known[name], objective, tmp_path, max_steps=steps)
    assert total_variation(trainer, truth) > FAR
    trainer.train()
    assert total_variation(trainer, truth) < NEAR
    assert total_variation(trainer, other) > FAR
