"""Base models for experiments: the embedded model, fine-tuned on generated texts by maximum likelihood."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from amortlm import LanguageModel
from amortlm.engine.passes import gather_log_probs, pad_right


def base_model_parser(
    doc: str | None, name: str, *, steps: int, batch: int, learning_rate: float, of: str
) -> argparse.ArgumentParser:
    """Options of a recipe that fine-tunes a base model on generated texts. of: what --batch counts."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--output", type=Path, default=Path("runs") / name)
    out.add_argument("--model", default="embedded")
    out.add_argument("--steps", type=int, default=steps)
    out.add_argument("--batch", type=int, default=batch, help=of)
    out.add_argument("--learning-rate", type=float, default=learning_rate)
    out.add_argument("--seed", type=int, default=0)
    return out


def fine_tune(
    lm: LanguageModel,
    batch: Callable[[], list[tuple[list[int], int]]],
    steps: int,
    learning_rate: float,
    output: Path,
) -> None:
    """Train on fresh documents by maximum likelihood, and save a model folder.

    batch: makes the documents of a step, as tokens and the number of last tokens that enter the loss."""
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
    """Mean of -log p in nats over the tokens that enter the loss."""
    ids, lengths = pad_right([d for d, _ in documents], model.device)
    counted = torch.tensor([n for _, n in documents])
    place = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (place < lengths[:, None]) & (place >= (lengths - counted)[:, None])
    log_p = gather_log_probs(model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
    return -(log_p * mask).sum() / mask.sum()
