"""Log-probabilities and gradients of tiny models of many architectures are those of plain forward passes, or refused.

All architectures: `python -m benchmarks.architectures`, docs/models.md.
"""

from __future__ import annotations

import pytest
from benchmarks.architectures import measure
from benchmarks.zoo import named

from amortlm import LanguageModel

EXACT = [
    # full attention, with rotary embeddings that change with the length, or learned positions
    "llama, yarn",
    "llama, longrope",
    "gpt2",
    "opt",  # positions with an offset; dropout by number
    "gpt_bigcode",
    # windows: of all layers, of some, in chunks, local; narrower than a prompt, than a prompt with its completion
    "mistral",
    "phi3, middle window",
    "gemma3_text",
    "qwen2, middle window",
    "gpt_oss",
    "gemma4_text",  # layers with heads of different sizes
    "llama4_text",
    "gpt_neo",
    # biases by distance
    "bloom",
    "mpt",
    "falcon, alibi",
    # experts, latent and sparse attention
    "mixtral",
    "deepseek_v3",
    "deepseek_v32, wide window",
    # states
    "mamba",
    "jamba",
    "qwen3_next",
    "lfm2",
    "blt",  # no cache that transformers could make
    # decoders whose positions are counted from the cache, or from the padding
    "bart",
    "roberta, decoder",
]
REFUSED = {
    "bert": "causal",  # sees what comes later
    "gemma, sees the future": "causal",
    "llama, longrope crossed": "LongRoPE",  # one model before the switch and another after it
    "glm_moe_dsa": "an index of glm_moe_dsa picks",  # keys of equal scores, by padding
}


@pytest.fixture(scope="module")
def tokenizer(embedded: LanguageModel):
    return embedded.tokenizer


@pytest.mark.parametrize("name", EXACT)
def test_what_is_computed_is_what_plain_passes_give(name, tokenizer):
    found = measure(named(name), tokenizer)
    assert {k: (c.outcome, c.message) for k, c in found.cells.items()} == dict.fromkeys(
        found.cells, ("exact", "")
    ), {k: c.off for k, c in found.cells.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_with_the_reason(name, tokenizer):
    for cell in measure(named(name), tokenizer).cells.values():
        assert cell.outcome == "refused"
        assert REFUSED[name] in cell.message
