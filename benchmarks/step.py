"""What one update costs, as a ratio to the bare model passes it needs.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--model embedded] [--task infilling|continuation]

Bare passes, same weights, rows and shapes, nothing else: the K-sample decode through the prompt's key/value cache, one
pass of the frozen model over the same tokens (with a suffix: over as many branch tokens), one forward and backward
of the policy. The whole update is `GFNTrainer.training_step` and the optimiser step. Both run in turn in one process;
the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from transformers import DynamicCache
from transformers.utils import logging as hf_logging

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Rollouts, Support, default_lora
from amortlm.passes import encode_prompts, select_cache, state_logits
from amortlm.tasks import infilling


def build(args: argparse.Namespace, folder: str) -> GFNTrainer:
    lm = LanguageModel.from_pretrained(args.model)
    suffix = args.task == "infilling"
    target = lm.log_prob("{z} {y}", given="{x}") if suffix else lm.log_prob("{z}", given="{x}") / 0.8
    config = GFNConfig(
        output_dir=folder,
        per_device_train_batch_size=args.prompts,
        num_samples=args.samples,
        replay_ratio=0.0,
        save_strategy="no",
        diagnose_steps=0,
        max_steps=10**6,
    )
    return GFNTrainer(
        lm,
        target=target,
        prompt="{y} {x}" if suffix else "{x}",
        support=Support(stop=".", min_tokens=3, max_tokens=args.tokens),
        train_dataset=infilling.SPEC.rows(),
        args=config,
        peft_config=default_lora(args.rank),
    )


class BarePasses:
    """The model passes of one update and nothing else."""

    def __init__(self, trainer: GFNTrainer, rows: list, rollouts: Rollouts):
        self.trainer, self.rollouts = trainer, rollouts
        self.prompts = trainer.policy.encode_rows(rows)
        terms = [term for _, term in trainer.target.terms]
        contexts = [terms[0].context(row) for row in rows]  # type: ignore[attr-defined]
        self.before = [c.before for c in contexts]
        branch = torch.tensor([len(c.after) for c in contexts])
        # Tokens that scoring the suffix after every stopping state must at least pass through the model.
        self.branch_tokens = int((branch[rollouts.row_index] * rollouts.stop_mask.sum(1)).sum())

    def decode(self) -> None:
        model, rollouts = self.trainer.policy.model, self.rollouts
        lengths = rollouts.lengths
        with torch.no_grad():
            prefix = encode_prompts(model, self.prompts)
            alive = torch.arange(len(lengths))
            cache = select_cache(prefix.cache, rollouts.row_index) or DynamicCache()
            mask, ids = prefix.mask[rollouts.row_index].long(), prefix.last[rollouts.row_index, None]
            for t in range(int(lengths.max()) + 1):
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )
                going = (lengths[alive] > t).nonzero().squeeze(1)
                if len(going) < len(alive) and len(going):
                    cache.batch_select_indices(going)
                    mask = mask[going]
                alive = alive[going]
                if not len(alive):
                    break
                ids = rollouts.tokens[alive, t : t + 1]

    def reference(self) -> None:
        model = self.trainer.lm.model
        with torch.no_grad():
            prefix = encode_prompts(model, self.before)
            state_logits(model, prefix, self.rollouts.row_index, self.rollouts.tokens)
            if self.branch_tokens:
                width = 64
                tokens = torch.ones(max(1, self.branch_tokens // width), width, dtype=torch.long)
                for chunk in tokens.split(32):
                    model(input_ids=chunk)

    def policy(self) -> None:
        model, rollouts = self.trainer.policy.model, self.rollouts
        prefix = encode_prompts(model, self.prompts)
        logits, _ = state_logits(model, prefix, rollouts.row_index, rollouts.tokens)
        logits.logsumexp(-1).sum().backward()
        self.trainer.policy.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--task", choices=("infilling", "continuation"), default="infilling")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args, folder)
        run(trainer, args)


def run(trainer: GFNTrainer, args: argparse.Namespace) -> None:
    rows = list(trainer.train_dataset[: args.prompts])
    trainer.create_optimizer_and_scheduler(100)
    trainer.current_gradient_accumulation_steps = 1
    trainer._next_micro_step = lambda: (0, 0)  # type: ignore[method-assign]  # the same completions every time
    rollouts = trainer.source.collect(rows, (0, 0))
    bare = BarePasses(trainer, rows, rollouts)

    def update() -> None:
        trainer.training_step(trainer.policy, {"rows": rows})
        trainer.policy.zero_grad()

    parts = {
        "decode": bare.decode,
        "reference pass": bare.reference,
        "policy forward and backward": bare.policy,
        "whole update": update,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(args.repeats + 1):
        for name, work in parts.items():
            elapsed = seconds(work)
            if repeat:
                times[name].append(elapsed)
    medians = {name: statistics.median(t) for name, t in times.items()}
    floor = sum(v for k, v in medians.items() if k != "whole update")
    print(
        f"{args.task} on {args.model}: {args.prompts} prompts x {args.samples} samples, {len(rollouts)} trajectories, "
        f"{int(rollouts.lengths.sum())} tokens, {bare.branch_tokens} branch tokens, {args.threads} thread(s)"
    )
    print(
        tabulate(
            [[k, 1000 * v, v / floor] for k, v in medians.items()],
            headers=["", "ms", "/ floor"],
            floatfmt=".2f",
        )
    )
    print(f"update / bare passes = {medians['whole update'] / floor:.2f}")


if __name__ == "__main__":
    main()
