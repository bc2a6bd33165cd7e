"""Infilling and tempered continuation of held-out TinyStories sentences on a real small model.

    python -m benchmarks.stories --model ../shared/models/stories3m --data ../shared/data/tinystories/val.txt

Compares, on prompts that training does not see, with 256 samples each: the untrained model given the beginning, the
untrained model also given the ending, and the trained policy. Prints a Markdown table; --output writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Posterior, Support, Target, default_lora

SAMPLES, UNSEEN, SEEN = 256, 16, 256
FIGURES = ("log_w_variance", "ess", "elbo", "log_z", "log_reward", "khat")
SUPPORT = Support(stop=".", min_tokens=3, max_tokens=20)


def story_rows(path: Path, lm: LanguageModel) -> list[dict[str, str]]:
    """Stories that open with "Once upon a time": x = sentences 1-3, gold = 4, y = 5, plain sentences only."""
    rows = []
    for story in re.split(r"(?=Once upon a time)", path.read_text(encoding="utf-8"))[1:]:
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(story.split()))[:5]
        plain = len(sentences) == 5 and all(re.fullmatch(r"[\w ,']+\.", s) for s in sentences[3:])
        length = len(lm.encode_continuation(" " + sentences[3])) - 1 if plain else 0
        if SUPPORT.min_tokens <= length <= SUPPORT.max_tokens:
            rows.append({"x": " ".join(sentences[:3]), "gold": " " + sentences[3], "y": sentences[4]})
    return rows


def measure(posterior: Posterior, rows: list[dict[str, str]]) -> dict[str, float]:
    """Means over rows of the importance diagnostics."""
    estimates = [posterior.estimate(row, SAMPLES).to_dict() for row in rows]
    return {name: sum(e[name] for e in estimates) / len(estimates) for name in FIGURES}


def untrained(lm: LanguageModel, target: Target, prompt: str) -> Posterior:
    return Posterior(Policy(lm, prompt, SUPPORT, default_lora(4)), target)


def compare(
    lm: LanguageModel, target: Target, prompts: dict[str, str], rows: list[Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One line per sampler; the last prompt is the one that is trained."""
    seen, unseen = rows[UNSEEN : UNSEEN + SEEN], rows[:UNSEEN]
    lines = []
    for name, prompt in prompts.items():
        lines.append({"sampler": name, **measure(untrained(lm, target, prompt), unseen)})
    config = GFNConfig(
        output_dir=str(args.work),
        objective=args.objective,
        max_steps=args.steps,
        per_device_train_batch_size=args.prompts,
        num_samples=args.samples,
        learning_rate=args.learning_rate,
        save_strategy="no",
        diagnose_steps=0,
    )
    trainer = GFNTrainer(
        lm,
        target=target,
        prompt=list(prompts.values())[-1],
        support=SUPPORT,
        train_dataset=seen,
        args=config,
        adapter=args.rank,
    )
    start = time.perf_counter()
    trainer.train(overwrite_output_dir=True)
    trained = {"sampler": f"GFlowNet ({args.objective})", **measure(trainer.posterior, unseen)}
    return [*lines, {**trained, "seconds": time.perf_counter() - start}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=("infilling", "continuation"), default="infilling")
    parser.add_argument("--objective", default="subtb")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/stories"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained(args.model)
    rows = story_rows(args.data, lm)
    if args.task == "infilling":
        target: Target = lm.log_prob("{z} {y}", given="{x}")
        prompts = {"untrained, beginning": "{x}", "untrained, ending and beginning": "{y} {x}"}
    else:
        target, prompts = lm.log_prob("{z}", given="{x}") / 0.8, {"untrained": "{x}"}
    lines = compare(lm, target, prompts, rows, args)
    print(
        f"{args.task}, {len(rows[UNSEEN : UNSEEN + SEEN])} training rows, {UNSEEN} unseen, {SAMPLES} samples each"
    )
    print(tabulate(lines, headers="keys", floatfmt=".3f", tablefmt="github"))
    if args.output:
        args.output.write_text(
            json.dumps({"settings": vars(args), "lines": lines}, indent=1, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
