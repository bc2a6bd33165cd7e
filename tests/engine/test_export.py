"""Merged weights as files: read by transformers, they are a model that does what the policy does."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig
from reference import tiny_lm, tiny_tokenizer
from safetensors.torch import load

from amortlm import LanguageModel, Policy, Support
from amortlm.engine.export import merged_file
from amortlm.errors import ConfigError

# By family: layers inside the model, the head, the embeddings.
LAYERS = {
    "llama": (["q_proj", "down_proj"], "lm_head", "embed_tokens"),
    "gpt2": (["c_attn", "c_proj"], "lm_head", "wte"),
    "gpt_neox": (["query_key_value", "dense"], "lm_head", "embed_in"),
}
KINDS = {
    "plain": {},
    "ranks and scales": {"rank_pattern": {0: 3}, "alpha_pattern": {1: 9}},  # of the layers of these numbers
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "tokens": {"trainable_token_indices": [3, 5]},
}
OTHERS = {
    "ia3": lambda layers: peft.IA3Config(target_modules=layers, feedforward_modules=[]),
    "adalora": lambda layers: peft.AdaLoraConfig(total_step=10, target_r=2, target_modules=layers),
    "vera": lambda layers: peft.VeraConfig(r=2, target_modules=layers[:1]),
    "tokens alone": lambda layers: peft.TrainableTokensConfig(token_indices=[3, 5]),
}
# On linear layers alone, which GPT-2 has not.
LINEAR = {
    "loha": lambda layers: peft.LoHaConfig(r=2, target_modules=layers),
    "lokr": lambda layers: peft.LoKrConfig(r=2, target_modules=layers),
    "oft": lambda layers: peft.OFTConfig(r=0, oft_block_size=4, target_modules=layers),
    "hra": lambda layers: peft.HRAConfig(r=2, target_modules=layers),
}
TEXT = torch.tensor([[5, 3, 7, 9, 4, 5]])


def policy_of(lm: LanguageModel, adapter: object) -> Policy:
    """Far from the model."""
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=3), adapter)
    generator = torch.Generator().manual_seed(1)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


def reread(data: bytes, lm: LanguageModel, tied: bool, folder) -> object:
    config = copy.deepcopy(lm.model.config)
    config.tie_word_embeddings = tied
    config.save_pretrained(str(folder))
    lm.model.generation_config.save_pretrained(str(folder))
    (folder / "model.safetensors").write_bytes(data)
    model, info = type(lm.model).from_pretrained(str(folder), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def check(policy: Policy, lm: LanguageModel, tied: bool, folder) -> None:
    before = [x.clone() for m in (policy.model, lm.model) for x in m.state_dict().values()]
    data = merged_file(policy.model, lm.model, torch.float32, tied)
    after = [x for m in (policy.model, lm.model) for x in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing is merged in place"
    assert merged_file(policy.model, lm.model, torch.float32, tied) == data, "the name is that of the bytes"
    q, p = (model(input_ids=TEXT).logits for model in (policy.model, lm.model))
    torch.testing.assert_close(reread(data, lm, tied, folder)(input_ids=TEXT).logits, q, atol=5e-5, rtol=0)
    assert (p - q).abs().max() > 0.01, "control"


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS, *LINEAR, "full"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_merged_model_is_the_policy(models, family, kind, tmp_path):
    if family == "gpt2" and kind in LINEAR:
        pytest.skip("peft has none for its layers")
    lm, layers = models[f"{family}-tied"], LAYERS[family][0]
    if kind in KINDS:
        own = {
            k: {layers[i]: r for i, r in x.items()} if "pattern" in k else x for k, x in KINDS[kind].items()
        }
        adapter = LoraConfig(r=2, target_modules=layers, **own)
    else:
        adapter = kind if kind == "full" else (OTHERS | LINEAR)[kind](layers)
    for tied in (True, False):
        check(policy_of(lm, adapter), lm, tied, tmp_path)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("how", ["lora", "saved"])
@pytest.mark.parametrize("end", [1, 2], ids=["head", "embeddings"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_head_and_embeddings_that_differ(models, family, how, end, tmp_path):
    """One tensor cannot be both; two can, also where the frozen model has one."""
    layers, name = LAYERS[family][0], LAYERS[family][end]
    own = (
        {"target_modules": [name]} if how == "lora" else {"target_modules": layers, "modules_to_save": [name]}
    )
    for head in ("tied", "untied"):
        lm = models[f"{family}-{head}"]
        check(policy_of(lm, LoraConfig(r=2, **own)), lm, False, tmp_path)
    lm = models[f"{family}-tied"]
    with pytest.raises(ConfigError, match="one tensor for both: start it with --untied, or leave"):
        merged_file(policy_of(lm, LoraConfig(r=2, **own)).model, lm.model, torch.float32, True)


def test_merging_is_in_float32_whatever_the_weights_are(models):
    """bfloat16 weights and what LoRA adds to them are summed in float32 and rounded once."""
    lm = models["llama-untied"]
    low = lm.with_model(copy.deepcopy(lm.model).bfloat16())
    policy = policy_of(low, LoraConfig(r=2, target_modules=["q_proj"]))
    found = load(merged_file(policy.model, low.model, torch.bfloat16, False))
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = (getattr(layer, f"lora_{k}")["default"].weight.float() for k in "AB")
    whole = layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)
    assert torch.equal(found[name], whole.bfloat16())
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    in_parts = layer.base_layer.weight + (layer.scaling["default"] * (b @ a)).bfloat16()
    assert not torch.equal(in_parts, found[name]), "control"


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_cannot_be_merged_is_refused():
    lm = tiny_lm("llama", tiny_tokenizer(), tied=False)
    biased = policy_of(lm, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ConfigError, match="peft cannot merge this adapter .*no bias.*draw locally"):
        merged_file(biased.model, lm.model, torch.float32, False)
    policy = policy_of(lm, 2)
    lm.model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(3, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ConfigError, match="quantised model exactly: load it with dtype=torch.bfloat16"):
        merged_file(policy.model, lm.model, torch.float32, False)
