"""The memory of an update for models of four sizes, on 1, 8 and 64 GPUs: the table in docs/scale.md.

python -m benchmarks.plan

The shapes are those of published models, in bfloat16; nothing is loaded (`amortlm.engine.footprint`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, LlamaConfig

from amortlm.engine.adapter import DEFAULT_RANK, FULL, trainable_copy
from amortlm.engine.footprint import Footprint, Shape
from amortlm.engine.memory import GPU_SHARE
from amortlm.engine.quantised import packed_bytes
from amortlm.train.plan import DEVICES, Plan

UPDATE = Shape(prompts=1, prompt_tokens=200, completions=8, completion_tokens=40)
GPU = 80  # GiB


class Blank:
    """What `trainable_copy` reads of a language model."""

    def __init__(self, name: str, **shape: Any):
        config = LlamaConfig(max_position_embeddings=4096, **shape)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        self.name = name


def models() -> list[Blank]:
    small: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    half = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    seven = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    seventy = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32000}
    return [
        Blank(
            "SmolLM2-135M", **small, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
        ),
        Blank(
            "Qwen2.5-0.5B", **half, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True
        ),
        Blank("Llama-2-7B", **seven, num_attention_heads=32, num_key_value_heads=32),
        Blank("Llama-2-70B", **seventy, num_attention_heads=64, num_key_value_heads=8),
    ]


def main() -> None:
    rows: list[list[object]] = []
    for blank in models():
        for adapter, packed in ((DEFAULT_RANK, False), (DEFAULT_RANK, True), (FULL, False)):
            policy = trainable_copy(blank, adapter)  # type: ignore[arg-type]
            found = Footprint.of(blank.model, policy, UPDATE)
            if packed:
                found = replace(found, weights=packed_bytes(blank.model))
            packs = GPU * 2**30 // GPU_SHARE
            plan, spared = (
                Plan(found, UPDATE, torch.bfloat16, packs, again, packed) for again in (False, True)
            )
            held = plan.held(1)
            trained = sum(held[name] for name in ("weights of q", "gradients", "Adam"))
            sums = [
                f"{sum(each.held(n).values()) / 2**30:.1f}" if n in each.devices else "-"
                for each in (plan, spared)
                for n in DEVICES
            ]
            kind = FULL if adapter == FULL else f"LoRA {adapter}{', NF4' if packed else ''}"
            rows.append(
                [blank.name, kind, *(f"{x / 2**30:.1f}" for x in (held["weights of p"], trained)), *sums]
            )
    columns = [f"{n}{also}" for also in ("", ", spared") for n in DEVICES]
    headers = ["", "q", "p", "q, gradients, Adam", *columns]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
