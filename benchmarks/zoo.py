"""Tiny random models of every causal architecture of transformers, by one rule over the fields of its configuration.

`tiny_model("mixtral", sliding_window=8)` shrinks what `MixtralConfig()` says: sizes and windows are small, dropout
is on, and there is one layer of each kind that the default has. What an architecture needs beyond that is in EXTRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 2560  # of the embedded tokenizer
POSITIONS = 256
# Tokens that a layer with a window sees: fewer than most texts have, than long ones alone, more than any.
WINDOW, MIDDLE, WIDE = 8, 24, 200
DROPOUT = 0.1
SCALE = 0.25  # standard deviation of the weights: distributions far from uniform

_SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups max_window_layers num_dense_layers "
    "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_layers_per_stack num_key_value_heads num_kv_heads swa_num_key_value_heads "
    "linear_num_key_heads index_topk_blocks num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts zero_expert_num",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "linear_num_heads num_query_groups num_experts num_local_experts n_routed_experts moe_num_experts "
    "time_step_rank mamba_dt_rank laurel_rank conv_kernel_size rotary_dim index_block_size",
    8: "head_dim kv_channels dim_head d_head attention_head_size swa_head_dim d_rel qk_rope_head_dim v_head_dim "
    "qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim query_pre_attn_scalar block_size "
    "index_n_heads chunk_size state_size ssm_state_size mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size "
    "mamba_head_dim mamba_num_heads hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank qk_head_dim "
    "index_head_dim o_lora_rank gated_norm_rank router_hidden_size hc_lowrank pronunciation_embed_dim shape_embed_dim",
    32: "hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
    "input_embedding_size output_embedding_size lru_width adapter_in_dim adapter_input_size adapter_out_dim",
    64: "intermediate_size ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp feed_forward_size prefix_dense_intermediate_size dense_intermediate_size",
    100: "pronunciation_vocab_size shape_vocab_size",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
    "max_target_positions rel_extent",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
# How far back a layer sees, in tokens.
_WINDOWS = (
    "sliding_window sliding_window_size attention_chunk_size window_size local_attention attention_window_size "
    "keep_window_size local_attention_window_len index_topk"
)
WINDOWS = frozenset(_WINDOWS.split())
# Where else a model begins to treat a text differently, in tokens.
CHUNKS = frozenset(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size", "indexer_budget"))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# Lists as long as there are layers, but of layers' numbers.
NUMBERS = frozenset(["moe_layers", "full_attn_idxs"])
# Kinds of layers that have a twin with a window.
WINDOWED = {"full_attention": "sliding_attention", "hybrid": "hybrid_sliding"}

_TWICE = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
EXTRA: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0, "attn_pdrop": DROPOUT}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "diffllama": {"attention_dropout": 0.0},  # it takes no other
    "dots3_note_text": {"per_layer_config": {2: {"head_dim": 16}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"moe_layers": [1]},
    "mamba2": {"head_dim": 16},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _TWICE, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _TWICE, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Kinds of which no text model of one's own can be made.
UNBUILT = {
    "gemma3n": "its vision tower needs the timm package; the text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "writes audio codes, several a step",
    "musicgen_melody": "writes audio codes, several a step",
}


def own_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What this configuration has beyond those of every model."""
    common = PretrainedConfig().to_dict().keys() - TOKENS.keys()
    return {k: v for k, v in config.to_dict().items() if k not in common}


def is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith(("pdrop", "layerdrop", "jitter_noise"))


def shrink(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments that make a small configuration of the same class."""
    has = own_fields(config)
    out: dict[str, Any] = {k: v for k, v in (SIZES | TOKENS).items() if k in has}
    out |= dict.fromkeys(sorted(WINDOWS & has.keys()), WINDOW)
    out |= {k: DROPOUT for k, v in has.items() if is_dropout(k) and isinstance(v, float)}
    if "use_sliding_window" in has:
        out["use_sliding_window"] = True
    if "kv_lora_rank" in has:  # latent attention: every head has keys of its own
        out["num_key_value_heads"] = out["num_attention_heads"]
    out |= shrink_layers(config, has)
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if isinstance(sub, PretrainedConfig):
            out[name] = shrink(sub) | {"model_type": sub.model_type}
    return out | EXTRA.get(config.model_type, {})


def shrink_layers(config: PretrainedConfig, has: dict[str, Any]) -> dict[str, Any]:
    """The lists with an entry for each layer, cut to the first layer of each kind; at least two layers."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        k: v
        for k, v in has.items()
        if isinstance(v, list) and len(v) == count and k not in SIZES.keys() | NUMBERS
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())
    first = first if len(first) > 1 else [0, 1]
    out: dict[str, Any] = {k: [v[i] for i in first] for k, v in lists.items()}
    types = out.get("layer_types", [])
    if "sliding_window" in has and len(set(types)) == 1:  # a window that no layer has by default
        types[-1] = WINDOWED.get(types[-1], types[-1])
    return out | {"num_hidden_layers": len(first)}


@cache
def default_config(kind: str) -> PretrainedConfig:
    return CONFIG_MAPPING[kind]()


def tiny_config(kind: str, **overrides: Any) -> PretrainedConfig:
    default = default_config(kind)
    return type(default)(**{**shrink(default), **overrides})


def tiny_model(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of this kind for the embedded tokenizer, in float32 and eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **overrides)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("A_log"):
            parameter.data.normal_(0, SCALE, generator=generator)
    return model


@dataclass(frozen=True)
class Case:
    """A model of the zoo: its name, its kind, and what differs from the kind's tiny configuration."""

    name: str
    kind: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        return tiny_model(self.kind, **self.overrides)


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


def _longrope(switch: int, **parameters: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    return _rope("longrope", original_max_position_embeddings=switch, **factors, **parameters)


SWITCH = 26  # tokens: between the two rows of `benchmarks.architectures`
CROSSED = 35  # tokens: inside the completions of the second row
NAMED = (
    Case(
        "deepseek_v4, middle compression",
        "deepseek_v4",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": MIDDLE}},
    ),
    Case("llama, linear rope", "llama", _rope("linear", factor=2.0)),
    Case("llama, dynamic rope", "llama", _rope("dynamic", factor=2.0)),
    Case("llama, yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    Case(
        "llama, llama3 rope",
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    Case("llama, longrope", "llama", _longrope(SWITCH, factor=4.0)),
    Case("llama, longrope crossed", "llama", _longrope(CROSSED, factor=4.0)),
    Case(
        "phi3, longrope",
        "phi3",
        {**_longrope(SWITCH), "original_max_position_embeddings": SWITCH, "sliding_window": None},
    ),
    Case(
        "phi3, longrope crossed",
        "phi3",
        {**_longrope(CROSSED), "original_max_position_embeddings": CROSSED, "sliding_window": None},
    ),
    Case(
        "phimoe, longrope",
        "phimoe",
        {**_longrope(SWITCH, short_mscale=1.2, long_mscale=1.4), "sliding_window": None},
    ),
    Case("falcon, alibi", "falcon", {"alibi": True, "new_decoder_architecture": False}),
    Case("qwen2, all layers sliding", "qwen2", {"layer_types": ["sliding_attention"] * 2}),
    Case("gemma3_text, all layers sliding", "gemma3_text", {"layer_types": ["sliding_attention"] * 2}),
    Case("gpt_bigcode, many heads", "gpt_bigcode", {"multi_query": False}),
    Case("gemma, sees the future", "gemma", {"use_bidirectional_attention": True}),
    Case("gemma3_text, sees the future", "gemma3_text", {"use_bidirectional_attention": True}),
    Case("xlm, causal", "xlm", {"causal": True}),
    Case("xlnet, one way", "xlnet", {"attn_type": "uni"}),
    Case("granitemoehybrid, no experts", "granitemoehybrid", {"num_local_experts": 0}),
)


def variants(kind: str) -> Iterator[Case]:
    """The kind as it is, with wider windows where it has any, an encoder also as a decoder, and those of NAMED."""
    yield Case(kind, kind)
    has = own_fields(default_config(kind))
    if windows := sorted(WINDOWS & has.keys()):
        yield Case(f"{kind}, wide window", kind, dict.fromkeys(windows, WIDE))
    if limits := sorted((WINDOWS | CHUNKS) & has.keys()):
        yield Case(f"{kind}, middle window", kind, dict.fromkeys(limits, MIDDLE))
    if has.get("is_decoder") is False and not default_config(kind).is_encoder_decoder:
        yield Case(f"{kind}, decoder", kind, {"is_decoder": True})
    yield from (case for case in NAMED if case.kind == kind)


def cases(only: Collection[str] = ()) -> Iterator[Case]:
    """Every variant of every kind that can be built, or those of these names of kinds and cases."""
    kinds = {name.partition(",")[0] for name in only} or set(KINDS)
    for kind in KINDS:
        if kind in kinds and kind not in UNBUILT:
            yield from (case for case in variants(kind) if not only or {case.name, kind} & set(only))


def named(name: str) -> Case:
    """The case of this name."""
    return next(case for case in variants(name.partition(",")[0]) if case.name == name)
