"""Do corrected samples in training pay? Exact total variation against updates and against what the models computed.

    OMP_NUM_THREADS=1 python -m benchmarks.closed_loop

A small Llama with random weights, one prompt, completions of one or two of 12 words (156, all enumerated), 8 samples
an update. The targets are constraints that the model meets in less than one sample of 100, and where what it then says
is spread over several completions. "gold" starts with two of these in the replay buffer. Each line is a mean over
seeds (smallest to largest). Cost is counted in tokens that went through a model, three times where a gradient was
taken; `--output` writes the curves as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as hf_logging

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Support, Target, constraint, exact

WORDS = [" the", " a", " dog", " cat", " ran", " home", " saw", " was", " happy", " sad", " to", " and"]
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=WORDS)
ROW = {"x": "Tom had a dog. One day the dog was lost."}
EVERY = 10  # updates between two measurements
BEHAVIOURS: dict[str, dict[str, float]] = {
    "no replay": {"tempered": 0.5},
    "replay 0.5": {"replay": 0.5, "tempered": 0.25},
    "corrected 0.25": {"corrected": 0.25, "tempered": 0.375},
    "corrected 0.5": {"corrected": 0.5, "tempered": 0.25},
}
Curve = list[tuple[int, int, float]]  # updates, tokens, total variation


def small_model() -> LanguageModel:
    """One layer of random weights, large enough for distributions far from uniform."""
    tokenizer = LanguageModel.from_pretrained("embedded", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return LanguageModel(model, tokenizer, name="small")


def tasks(lm: LanguageModel) -> dict[str, tuple[Target, list[list[str]] | None]]:
    """(target, gold completions of the one row)."""
    prior = lm.log_prob("{z}", given="{x}")
    rare = prior + constraint.contains("to")
    return {
        "rare word": (rare, None),
        "rare word, gold": (rare, [[" to", " was to"]]),
        "two modes": (prior + constraint.matches(r".*\b(a|home)\b.*"), None),
    }


class Meter(TrainerCallback):
    """Counts tokens through both models, and measures the exact distance every few updates."""

    def __init__(self, trainer: GFNTrainer, log_p: torch.Tensor):
        self.trainer, self.log_p = trainer, log_p
        self.tokens, self.curve, self._counting = 0, Curve(), True
        modules = (trainer.policy.model, trainer.lm.model)
        self.handles = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in modules]

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        if self._counting:
            self.tokens += kwargs["input_ids"].numel() * (3 if torch.is_grad_enabled() else 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self._counting = False
            log_q = exact.policy_log_probs(self.trainer.policy, ROW)
            distance = exact.distance(log_q, self.log_p).total_variation
            self.curve.append((state.global_step, self.tokens, distance))
            self._counting = True


def run(lm: LanguageModel, target: Target, gold: Any, log_p: torch.Tensor, settings: dict[str, Any]) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        config = GFNConfig(
            output_dir=folder,
            lr_scheduler_type="constant_with_warmup",  # a curve may be read at any point
            learning_rate=1e-3,
            num_samples=8,
            per_device_train_batch_size=1,
            diagnose_steps=0,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = GFNTrainer(
            lm,
            target=target,
            prompt="{x}",
            support=SUPPORT,
            train_dataset=[ROW],
            adapter="full",
            gold=gold,
            args=config,
        )
        meter = Meter(trainer, log_p)
        trainer.add_callback(meter)
        trainer.train()
        for handle in meter.handles:
            handle.remove()
    return meter.curve


def at_cost(curve: Curve, tokens: int) -> float:
    """Total variation at the last measurement within a budget of tokens."""
    return [tv for _, used, tv in curve if used <= tokens][-1]


def line(name: list[str], curves: list[Curve], budget: int) -> list[str]:
    """Mean (and smallest to largest) over seeds at half the updates, at all of them, and at equal cost."""
    half = len(curves[0]) // 2 - 1
    columns = [[c[half][2] for c in curves], [c[-1][2] for c in curves], [at_cost(c, budget) for c in curves]]
    cells = [f"{statistics.mean(v):.3f} ({min(v):.2f}-{max(v):.2f})" for v in columns]
    return [*name, *cells, f"{statistics.mean(c[-1][1] for c in curves) / 1000:.1f}k"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=["vargrad", "subtb", "forward_kl"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    lm = small_model()
    curves: dict[str, list[Curve]] = {}
    lines = []
    for task, (target, gold) in tasks(lm).items():
        log_p = exact.enumerate_posterior(target, SUPPORT.bind(lm), ROW).log_p
        for objective in args.objectives:
            for behaviour, mix in BEHAVIOURS.items():
                if objective == "forward_kl":
                    if mix.get("replay"):
                        continue  # its weights are those of samples of q
                    mix = {**mix, "tempered": 0.0}
                common = {"objective": objective, "max_steps": args.updates, "behaviour": mix}
                name = [task, objective, behaviour]
                found = [run(lm, target, gold, log_p, {**common, "seed": s}) for s in range(args.seeds)]
                curves["/".join(name)] = found
                budget = min(c[-1][1] for c in curves[f"{task}/{objective}/no replay"])
                lines.append(line(name, found, budget))
                print(" | ".join(lines[-1]), flush=True)
    n = args.updates
    headers = ["target", "objective", "behaviour", f"TV at {n // 2}", f"TV at {n}", "at equal cost", "tokens"]
    print("\n" + tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    if args.output:
        args.output.write_text(json.dumps(curves, indent=1))


if __name__ == "__main__":
    main()
