"""Train the embedded model on a CPU and export it: ``python -m recipes.embedded.train --help``."""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from . import corpus as texts
from .export import export
from .packing import PARTS, Packer, mean_lengths
from .review_words import PHRASES
from .tokenizer import CONTEXT, train_tokenizer

log = logging.getLogger("train")
VOCABULARY, HIDDEN, LAYERS, HEADS, INNER = 2560, 192, 6, 4, 512
ROWS, LENGTH, LONG_LENGTH = 8, 256, 512
PEAK_RATE, FLOOR, WARM_UP, EMA = 1.2e-3, 0.03, 300, 0.999
BETAS = (0.9, 0.99)  # a long second average, because a batch is small
TOKENIZER_SAMPLE, PHRASE_REPEAT = 4000, 60


@dataclass
class State:
    """What a checkpoint holds besides the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real text")
    parser.add_argument("--output", type=Path, required=True, help="folder the model is exported to")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--minutes", type=float, default=85.0, help="training time, over all resumed runs")
    parser.add_argument("--tokens", type=float, default=None, help="stop after this many tokens instead")
    parser.add_argument(
        "--long-share", type=float, default=0.08, help="last share of training on 512-token rows"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--export-minutes", type=float, default=20.0, help="time between interim exports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    return parser.parse_args()


def build_model() -> LlamaForCausalLM:
    """A fresh model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    )


def load_tokenizer(work: Path, corpus: texts.Corpus) -> Tokenizer:
    """The tokenizer of this run, trained on first use and then kept."""
    path = work / "tokenizer.json"
    if not path.exists():
        sample = [corpus.document(part, 10**7 + i) for part in PARTS for i in range(TOKENIZER_SAMPLE)]
        sample += [f" {phrase}" for phrases in PHRASES.values() for phrase in phrases] * PHRASE_REPEAT
        train_tokenizer(sample, VOCABULARY).save(str(path))
    return Tokenizer.from_file(str(path))


def rate(progress: float, step: int) -> float:
    """Learning rate: short warm-up, then linear decay over the budget."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * max(0.0, 1.0 - progress))


class Trainer:
    """The training loop and what it keeps."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.state = args, State()
        self.corpus = texts.Corpus(args.data, args.seed)
        self.tokenizer = load_tokenizer(args.work, self.corpus)
        self.model = build_model()
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS, fused=True)
        self.weights = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.weights]
        self.seen = torch.zeros(len(PARTS), dtype=torch.int64)
        counts = self._resume()
        lengths = mean_lengths(self.corpus, self.encode)
        self.packer = Packer(self.corpus, self.encode, lengths, counts)
        self.loss_of = self._losses if args.no_compile else torch.compile(self._losses)
        self.sums = torch.zeros(2, len(PARTS), dtype=torch.float64)

    def encode(self, text: str) -> list[int]:
        return [1, *self.tokenizer.encode(text, add_special_tokens=False).ids, 2]

    @property
    def checkpoint(self) -> Path:
        return self.args.work / "checkpoint.pt"

    def _resume(self) -> dict[str, int]:
        if not self.checkpoint.exists():
            return {}
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["betas"] = BETAS
        self.average = saved["average"]
        self.state, self.seen = State(**saved["state"]), saved["seen"]
        log.info("resumed at step %d", self.state.step)
        return saved["counts"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "state": vars(self.state),
                "counts": self.packer.counts,
                "seen": self.seen,
            },
            fresh,
        )
        fresh.replace(self.checkpoint)

    def _losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")

    @property
    def progress(self) -> float:
        if self.args.tokens:
            return self.state.tokens / self.args.tokens
        return self.state.seconds / (60 * self.args.minutes)

    def step(self) -> None:
        """One batch."""
        long = self.progress > 1 - self.args.long_share
        length = LONG_LENGTH if long else LENGTH
        ids, parts = self.packer.batch(ROWS * LENGTH // length, length)
        part = parts[:, 1:].flatten()
        real = ids[:, 1:].flatten() != 1
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.progress, self.state.step)
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.loss_of(ids[:, :-1].contiguous(), ids[:, 1:].flatten())
        (losses * real).sum().div(real.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - self._averaging())
        self.sums[0].index_add_(0, part[real], losses.detach()[real].double())
        self.sums[1] += torch.bincount(part[real], minlength=len(PARTS))
        self.seen += torch.bincount(parts.flatten(), minlength=len(PARTS))
        self.state.step += 1
        self.state.tokens += int(real.sum())

    def _averaging(self) -> float:
        return min(EMA, (1 + self.state.step) / (10 + self.state.step))

    def report(self) -> None:
        """Append one line to the log."""
        means = (self.sums[0] / self.sums[1].clamp(min=1)).tolist()
        line = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "minutes": round(self.state.seconds / 60, 2),
            "loss": round(float(self.sums[0].sum() / self.sums[1].sum()), 4),
            "parts": {part: round(mean, 4) for part, mean in zip(PARTS, means, strict=True)},
            "seen": dict(zip(PARTS, self.seen.tolist(), strict=True)),
        }
        with open(self.args.work / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sums.zero_()

    def export(self) -> None:
        """Write the averaged weights as a model folder."""
        model = build_model()
        with torch.no_grad():
            for target, source in zip(model.parameters(), self.average, strict=True):
                target.copy_(source)
        export(model, self.tokenizer, self.args.output)

    def run(self) -> None:
        """Train until the budget is spent."""
        last = saved = exported = time.monotonic()
        while self.progress < 1.0:
            self.step()
            now = time.monotonic()
            self.state.seconds += now - last
            last = now
            if self.state.step % 100 == 0:
                self.report()
            if now - saved > 60 * self.args.checkpoint_minutes:
                self.save()
                saved = now
            if now - exported > 60 * self.args.export_minutes:
                self.export()
                exported = now
        self.report()
        self.save()
        self.export()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.export_only:
        trainer.export()
    else:
        trainer.run()


if __name__ == "__main__":
    main()
