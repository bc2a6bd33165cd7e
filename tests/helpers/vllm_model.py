"""A tiny Llama that vLLM can run on a CPU, whose attention heads have at least 32 numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from reference import CONTEXT, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def save_tiny_llama(folder: str | Path) -> None:
    """Two layers, two heads, 48 tokens; float32, far from uniform."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


if __name__ == "__main__":
    save_tiny_llama(sys.argv[1])
