"""A model that knows stories in two orders, for the infilling experiment: the embedded model, fine-tuned on fresh
generated stories as they are told and with the ending in front.

    python recipes/story_model.py --output runs/story-model

Hu et al. 2024 fine-tune GPT-2 Large on 50,000 stories before they infill (section 4.3). The embedded model needs it
more: it has never seen an ending before its story, so no sampler finds out from a few hundred examples what one is for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from amortlm import LanguageModel
from amortlm.passes import gather_log_probs, pad_right

sys.path.insert(0, str(Path(__file__).parent / "embedded"))
from stories import story

HELD_OUT = 64


def document(lm: LanguageModel, key: str, turned: bool) -> tuple[list[int], int]:
    """Tokens of a story, and how many of the last count. Turned: the ending as a document of its own, then the
    beginning, then the middle, which alone counts."""
    s = story(key).sentences
    if not turned:
        ids = [*lm.encode_start(" ".join(s)), lm.tokenizer.eos_token_id]
        return ids, len(ids) - 1
    middle = lm.encode_continuation(" " + s[3])
    return [*lm.encode_start(f"{s[4]}</s><s>{' '.join(s[:3])}"), *middle], len(middle)


def loss_of(model: Any, documents: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over the tokens that count of -log p, nats."""
    ids, lengths = pad_right([d for d, _ in documents], model.device)
    counted = torch.tensor([n for _, n in documents])
    place = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (place < lengths[:, None]) & (place >= (lengths - counted)[:, None])
    log_p = gather_log_probs(model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
    return -(log_p * mask).sum() / mask.sum()


@torch.no_grad()
def middle_loss(lm: LanguageModel) -> tuple[float, float]:
    """Mean -log p of a held-out fourth sentence, in nats, without and with the ending in front."""
    totals = [0.0, 0.0]
    for i in range(HELD_OUT):
        s = story(f"story model, held out/{i}").sentences
        middle = lm.encode_continuation(" " + s[3])
        for k, before in enumerate((" ".join(s[:3]), f"{s[4]}</s><s>{' '.join(s[:3])}")):
            ids = torch.tensor([[*lm.encode_start(before), *middle]])
            logits = lm.model(input_ids=ids).logits[:, -len(middle) - 1 : -1]
            totals[k] -= gather_log_probs(logits, ids[:, -len(middle) :]).sum().item() / HELD_OUT
    return totals[0], totals[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/story-model"))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=24, help="stories per step, a quarter of them as told")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    lm = LanguageModel.from_pretrained(args.model)
    before = middle_loss(lm)
    model: Any = lm.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    rng, start = random.Random(args.seed), time.perf_counter()
    for step in trange(args.steps, desc="story model", disable=None):
        progress = step / args.steps
        rate = (
            args.learning_rate
            * min(1.0, (step + 1) / 50)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        keys = [f"story model {rng.getrandbits(60)}" for _ in range(args.batch)]
        loss = loss_of(model, [document(lm, key, i % 4 > 0) for i, key in enumerate(keys)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            plain, turned = middle_loss(lm)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, middle {plain:.2f}, after its ending {turned:.2f}",
                flush=True,
            )
            model.save_pretrained(args.output)
    model.save_pretrained(args.output)
    lm.tokenizer.save_pretrained(args.output)
    names = ("middle_nats", "middle_after_ending_nats")
    figures = {
        "before": dict(zip(names, before, strict=True)),
        "after": dict(zip(names, middle_loss(lm), strict=True)),
    }
    figures |= {"stories": args.steps * args.batch, "seconds": round(time.perf_counter() - start)}
    (args.output / "story_model.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
