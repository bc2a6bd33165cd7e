"""What the recipes share: their command line, quiet training, fine-tuned base models, and results that a second start
goes on from."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tabulate import tabulate
from tqdm import trange
from transformers import set_seed
from transformers.utils import logging as hf_logging

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Posterior, Support, Target, default_lora
from amortlm.engine.passes import gather_log_probs, pad_right
from amortlm.errors import ConfigError
from amortlm.files import write_text
from amortlm.lab.reproduce.storage import environment, finite, write_json
from amortlm.types import Row

Metrics = dict[str, float]


def parser(doc: str | None, name: str, steps: int, seeds: int) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    out.add_argument("--model", default="embedded", help="embedded, or a folder or hub name")
    out.add_argument("--steps", type=int, default=steps, help=f"updates of a training run (default {steps})")
    out.add_argument("--seeds", type=int, default=seeds, help=f"seeds 0, 1, ... (default {seeds})")
    out.add_argument("--output", type=Path, default=Path("runs") / name, help=f"default runs/{name}")
    return out


def base_model_parser(
    doc: str | None, name: str, *, steps: int, batch: int, learning_rate: float, of: str
) -> argparse.ArgumentParser:
    """For recipes that fine-tune a base model on generated texts. of: what a batch counts."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--output", type=Path, default=Path("runs") / name)
    out.add_argument("--model", default="embedded")
    out.add_argument("--steps", type=int, default=steps)
    out.add_argument("--batch", type=int, default=batch, help=of)
    out.add_argument("--learning-rate", type=float, default=learning_rate)
    out.add_argument("--seed", type=int, default=0)
    return out


def load_model(name: str) -> LanguageModel:
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    torch.set_num_threads(1)  # small models on few cores: more threads are slower
    return LanguageModel.from_pretrained(name)


def untrained(lm: LanguageModel, target: Target, prompt: str, support: Support) -> Posterior:
    """The frozen model itself under a prompt: a fresh adapter changes nothing."""
    set_seed(0)
    return Posterior(Policy(lm, prompt, support, default_lora(1)), target.bind(lm))


def train(
    lm: LanguageModel,
    target: Target,
    prompt: str,
    support: Support,
    rows: Sequence[Row],
    *,
    lora: int = 16,
    gold: Sequence[Sequence[str]] | None = None,
    **config: Any,
) -> Posterior:
    """A trained posterior, kept in memory. config: fields of GFNConfig; gold: completions for the buffer."""
    quiet = {"save_strategy": "no", "diagnose_steps": 0, "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GFNTrainer(
            lm,
            target=target,
            prompt=prompt,
            support=support,
            train_dataset=rows,
            args=GFNConfig(**{**quiet, **config, "output_dir": folder}),
            adapter=lora,
            gold=gold,
        )
        trainer.train()
    return trainer.posterior


def fine_tune(
    lm: LanguageModel,
    batch: Callable[[], list[tuple[list[int], int]]],
    steps: int,
    learning_rate: float,
    output: Path,
) -> None:
    """Maximum likelihood of fresh documents (tokens, and how many of the last count), saved as a model folder."""
    model: Any = lm.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    bar = trange(steps, desc=output.name, disable=None)
    for step in bar:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 50) * decay
        loss = document_loss(model, batch())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(output)
    lm.tokenizer.save_pretrained(output)


def document_loss(model: Any, documents: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over the tokens that count of -log p, nats."""
    ids, lengths = pad_right([d for d, _ in documents], model.device)
    counted = torch.tensor([n for _, n in documents])
    place = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (place < lengths[:, None]) & (place >= (lengths - counted)[:, None])
    log_p = gather_log_probs(model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
    return -(log_p * mask).sum() / mask.sum()


def average(rows: Sequence[Metrics]) -> Metrics:
    """Mean of each figure over those rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean(row[name] for row in rows if name in row) for name in names}


class Results:
    """Figures by method and seed in `folder`/results.json. What is there is not measured again.

    settings: all that the figures depend on. Raises ConfigError if the folder holds results of others.
    """

    def __init__(self, folder: Path, title: str, settings: dict[str, Any]):
        self.file, self.title = folder / "results.json", title
        self.settings = json.loads(json.dumps(settings, default=str))
        self.runs: list[dict[str, Any]] = []
        if self.file.exists():
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["settings"] != self.settings:
                raise ConfigError(f"{self.file} was made with other settings; choose another --output")
            self.runs = found["runs"]

    def run(self, method: str, seed: int, measure: Callable[[], Metrics]) -> None:
        if any((r["method"], r["seed"]) == (method, seed) for r in self.runs):
            return
        started, where = time.perf_counter(), environment()
        if sys.stderr.isatty():
            print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
        metrics = finite(measure())
        seconds = round(time.perf_counter() - started, 1)
        self.runs.append(
            {"method": method, "seed": seed, "metrics": metrics, "seconds": seconds, "where": where}
        )
        write_json(self.file, {"settings": self.settings, "command": self.command, "runs": self.runs})

    @property
    def command(self) -> str:
        return shlex.join(["python", *sys.argv])

    def table(self, tablefmt: str = "simple") -> str:
        """A column per method: mean of each figure over seeds, ± standard deviation between them."""
        values: dict[str, dict[str, list[float | None]]] = {}
        methods = list(dict.fromkeys(r["method"] for r in self.runs))
        for r in self.runs:
            for name, value in r["metrics"].items():
                values.setdefault(name, {}).setdefault(r["method"], []).append(value)
        body = [[name, *(_spread(of.get(m, [])) for m in methods)] for name, of in values.items()]
        return tabulate(body, ["", *methods], tablefmt=tablefmt, disable_numparse=True)

    def finish(self, notes: str) -> None:
        """Write README.md beside results.json and print the table."""
        commits = ", ".join(sorted({str(r["where"]["commit"]) for r in self.runs}))
        seconds = sum(r["seconds"] for r in self.runs)
        text = f"# {self.title}\n\n{self.table('github')}\n\n{notes}\n\n"
        text += f"    {self.command}\n\nCommit {commits}; {seconds:.0f} s in all.\n"
        write_text(self.file.with_name("README.md"), text)
        print(self.table())


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    return f"{mean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")
