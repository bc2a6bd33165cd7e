"""How near does training come to the exact posterior if the user sets nothing?

    python -m benchmarks.defaults embedded
    python -m benchmarks.defaults models/SmolLM2-135M-Instruct.Q4_1.gguf --targets infilling
    python -m benchmarks.defaults embedded --settings '{"objective": "subtb", "num_samples": 8}'

Posteriors over one to three words of a list, which can be enumerated, given one beginning and ending, or four.
`--settings` replaces defaults, for comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Support, Target, constraint
from amortlm.inference.exact import distance, enumerate_posterior, policy_log_probs

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "ran",
    "home",
    "saw",
    "was",
    "happy",
    "sad",
    "to",
    "and",
    "her",
    "his",
    "she",
    "found",
]
ROWS = [
    {
        "x": "Ann left her bag on the bus. She called the driver.",
        "y": "In the evening Ann had her bag again.",
    },
    {"x": "Ben planted a seed in a pot. He watered it every day.", "y": "It was as tall as Ben in the end."},
    {"x": "A small dog came to the door. It was cold outside.", "y": "Now the dog sleeps next to the fire."},
    {
        "x": "Mia wanted to bake bread. There was no flour in the house.",
        "y": "They ate it while it was warm.",
    },
]


def targets(lm: LanguageModel) -> dict[str, Target]:
    prior = lm.log_prob("{z}", given="{x}")
    return {
        "infilling": lm.log_prob("{z} {y}", given="{x}"),
        "tempered": prior / 0.7,
        "contrastive": 1.5 * prior - 1.0 * lm.log_prob("{z}"),
        "constrained": prior + constraint.contains("cat"),
    }


def run(lm: LanguageModel, name: str, rows: int, seed: int, settings: Mapping[str, Any]) -> list[Any]:
    """[what was chosen, TV before, TV after (means over the rows), seconds of training]"""
    data = ROWS[:rows]
    words = [f" {word}" for word in WORDS if len(lm.encode_continuation(f" {word}")) == 1]
    support = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=words)
    target = targets(lm)[name]
    truth = [enumerate_posterior(target, support.bind(lm), row) for row in data]
    with tempfile.TemporaryDirectory() as folder:
        args = GFNConfig(output_dir=folder, save_strategy="no", seed=seed, **settings)
        trainer = GFNTrainer(lm, target=target, prompt="{x}", support=support, train_dataset=data, args=args)

        def total_variation() -> float:
            found = [policy_log_probs(trainer.policy, row) for row in data]
            return mean(distance(q, p.log_p).total_variation for q, p in zip(found, truth, strict=True))

        before, start = total_variation(), time.time()
        trainer.train()
        seconds = time.time() - start
        chosen = f"{trainer.objective.name}, K = {trainer.args.num_samples}"
        return [chosen, before, total_variation(), round(seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="embedded, hub name, folder or GGUF file")
    parser.add_argument(
        "--targets", nargs="+", default=["infilling", "tempered", "contrastive", "constrained"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="prompts in the training data")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={}, help="of GFNConfig, as JSON")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained(args.model, dtype=torch.float32)
    table = []
    for name in args.targets:
        for rows in args.rows:
            for seed in range(args.seeds):
                table.append([name, rows, seed, *run(lm, name, rows, seed, args.settings)])
                print(table[-1], flush=True)
    headers = ["target", "rows", "seed", "chosen", "TV before", "TV after", "seconds"]
    print(tabulate(table, headers, "github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
