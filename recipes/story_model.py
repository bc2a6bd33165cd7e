"""A base model for the infilling experiment: the embedded model, fine-tuned on fresh generated stories in two orders,
in their usual order and with the ending in front.

    python recipes/story_model.py --output runs/story-model

Hu et al. 2024 fine-tune GPT-2 Large on 50,000 stories before they infill (section 4.3). The embedded model needs it
more: it has never seen an ending before its story, and no sampler learns from a few hundred examples how to use one.
"""

from __future__ import annotations

import json
import random
import time

import torch

from amortlm import LanguageModel
from amortlm.engine.passes import gather_log_probs
from embedded.stories import story
from fine_tuning import base_model_parser, fine_tune

HELD_OUT = 64


def document(lm: LanguageModel, key: str, turned: bool) -> tuple[list[int], int]:
    """Tokens of a story, and how many of the last tokens have a loss. Turned: the ending as a separate document, then
    the beginning, then the middle; only the middle has a loss."""
    s = story(key).sentences
    if not turned:
        ids = [*lm.encode_start(" ".join(s)), lm.tokenizer.eos_token_id]
        return ids, len(ids) - 1
    middle = lm.encode_continuation(" " + s[3])
    return [*lm.encode_start(f"{s[4]}</s><s>{' '.join(s[:3])}"), *middle], len(middle)


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
    args = base_model_parser(
        __doc__,
        "story-model",
        steps=1600,  # with 3000 the prompted model is the posterior, and there is nothing left to train
        batch=32,
        learning_rate=1e-3,
        of="stories per step, a quarter of them as told",
    ).parse_args(argv)
    lm = LanguageModel.from_pretrained(args.model)
    before, start, rng = middle_loss(lm), time.perf_counter(), random.Random(args.seed)

    def batch() -> list[tuple[list[int], int]]:
        keys = [f"story model {rng.getrandbits(60)}" for _ in range(args.batch)]
        return [document(lm, key, i % 4 > 0) for i, key in enumerate(keys)]

    fine_tune(lm, batch, args.steps, args.learning_rate, args.output)
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
