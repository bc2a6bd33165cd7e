"""Tiny models that vLLM can run on a CPU, whose attention heads have at least 32 numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from reference import CONTEXT, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def save_tiny_llama(folder: str | Path) -> None:
    """Two layers, two heads, 48 tokens; float32, far from uniform."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=1,
        vocab_size=len(tiny_tokenizer()),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    _save(LlamaForCausalLM(config), folder)


def save_tiny_gpt2(folder: str | Path) -> None:
    """The same size; its embeddings are its head."""
    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=2,
        vocab_size=len(tiny_tokenizer()),
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    _save(GPT2LMHeadModel(config), folder)


def _save(model: Any, folder: str | Path) -> None:
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))


if __name__ == "__main__":
    save_tiny_llama(sys.argv[1])
