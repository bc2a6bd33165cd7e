"""Adapters of every kind: the frozen p never moves, q is exact and comes back from disk, nothing is shared in vain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from reference import slow_log_q, tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from amortlm.errors import CheckpointError, ConfigError
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support

ROWS = [{"x": "the dog"}, {"x": "a"}]
SUPPORT = Support(stop=".", max_tokens=6)
IDS = torch.tensor([[0, 5, 9, 20, 33, 12]])


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)


# Plain LoRA, and all that may write into the weights it is put on, or train them.
LORAS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    **{
        name: lambda name=name: lora(init_lora_weights=name)
        for name in ("gaussian", "orthogonal", "eva", "pissa", "pissa_niter_2", "olora")
    },
    "random B": lambda: lora(init_lora_weights=False),
    "bias": lambda: lora(bias="all"),
    "bias of the layers": lambda: lora(bias="lora_only"),
    "pissa and bias": lambda: lora(init_lora_weights="pissa", bias="all"),
    "head trained": lambda: lora(modules_to_save=["lm_head"]),
    "norms trained": lambda: lora(modules_to_save=["norm", "ln_f"]),
    "dora": lambda: lora(use_dora=True),
    "pissa and dora": lambda: lora(init_lora_weights="pissa", use_dora=True),
    "rslora": lambda: lora(init_lora_weights="olora", use_rslora=True),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "wte", "q_proj", "c_attn"]),
    "new tokens": lambda: lora(trainable_token_indices=[3, 7]),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "AdaLora": lambda: peft.AdaLoraConfig(target_modules="all-linear", init_r=4, target_r=2, total_step=10),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules="all-linear", r=2, rank_dropout=0.5),
    "LoKr": lambda: peft.LoKrConfig(target_modules="all-linear", r=2, module_dropout=0.5),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=8),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8, bias="all"),
    "HRA": lambda: peft.HRAConfig(target_modules=["q_proj"], r=4),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "RandLora": lambda: peft.RandLoraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=20),
    "VBLoRA": lambda: peft.VBLoRAConfig(
        target_modules=["q_proj"], r=2, num_vectors=8, vector_length=8, topk=2
    ),
    "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "TrainableTokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 7]),
    "MiSS": lambda: peft.MissConfig(target_modules=["q_proj"], r=4),
    "C3A": lambda: peft.C3AConfig(target_modules=["q_proj"], block_size=8),
    "RoAd": lambda: peft.RoadConfig(target_modules=["q_proj"], group_size=8),
    "SHiRA": lambda: peft.ShiraConfig(target_modules=["q_proj"], r=2),
    "DeLoRA": lambda: peft.DeloraConfig(target_modules=["q_proj"], r=4),
    "WaveFT": lambda: peft.WaveFTConfig(target_modules=["q_proj"], n_frequency=20),
}
INEXACT: dict[str, Callable[[], Any]] = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    "POLY": lambda: peft.PolyConfig(target_modules=["q_proj"]),
    "alora": lambda: lora(alora_invocation_tokens=[3, 4], target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "loftq": lambda: lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
}


def fresh(family: str = "llama", tied: bool = False) -> LanguageModel:
    return tiny_lm(family, tiny_tokenizer(add_bos=family == "llama"), tied=tied)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=IDS).logits.clone()


def check_p_stands_still(lm: LanguageModel, config: Any, folder: Path) -> None:
    """A policy is made, trained, saved, loaded and merged: p is the same to the bit, q exact, and the same from disk."""
    before = logits(lm)
    state = {k: v.clone() for k, v in lm.model.state_dict().items()}
    torch.manual_seed(0)
    policy = Policy(lm, "{x}", SUPPORT, config)
    rollouts = policy.rollouts(ROWS, [[" cat ran", "abc"], ["the the"]])

    def log_q(policy: Policy) -> torch.Tensor:
        with torch.no_grad():
            return policy.evaluate(rollouts).final(rollouts.lengths)

    start = log_q(policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        policy.train()
        policy.evaluate(rollouts).final(rollouts.lengths).sum().backward()
        optimizer.step()
    for p in trained:  # where gradients vanish at first
        p.data += 0.02 * torch.randn_like(p.float()).to(p.dtype)
    policy.eval()
    after = log_q(policy)
    assert not torch.allclose(start, after), "q moves"
    prompt = lm.encode_prompt(policy.prompt, ROWS[0])
    log_pf, log_pterm = slow_log_q(policy, prompt, rollouts.completions()[0])
    assert after[0].item() == pytest.approx(sum(log_pf) + log_pterm[-1], abs=1e-4), "q is exact"

    policy.save_adapter(folder)
    torch.manual_seed(1)
    loaded = Policy(lm, "{x}", SUPPORT, folder)
    torch.testing.assert_close(log_q(loaded), after, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == sum(p.numel() for p in trained)
    torch.manual_seed(2)
    again = Policy(lm, "{x}", SUPPORT, config)
    again.load_adapter(folder)
    torch.testing.assert_close(log_q(again), after, rtol=0, atol=1e-6)

    policy.model.merge_adapter()
    torch.testing.assert_close(log_q(policy), after, rtol=0, atol=1e-3)
    policy.model.unmerge_adapter()
    policy.model = policy.model.merge_and_unload()
    torch.testing.assert_close(log_q(policy), after, rtol=0, atol=1e-3)
    assert torch.equal(logits(lm), before)
    assert all(torch.equal(v, state[k]) for k, v in lm.model.state_dict().items())
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("name", LORAS)
def test_p_stands_still_under_lora(name: str, tmp_path: Path) -> None:
    check_p_stands_still(fresh(), LORAS[name](), tmp_path)


@pytest.mark.parametrize("name", ["default", "pissa", "bias", "norms trained", "embeddings", "new tokens"])
def test_p_stands_still_under_lora_with_a_tied_head(name: str, tmp_path: Path) -> None:
    check_p_stands_still(fresh("gpt2", tied=True), LORAS[name](), tmp_path)


def test_what_peft_cannot_do_is_one_error() -> None:
    with pytest.raises(ConfigError, match="peft cannot put this LORA adapter into tiny gpt2"):
        Policy(fresh("gpt2"), "{x}", SUPPORT, lora(init_lora_weights="olora"))


@pytest.mark.parametrize("name", OTHERS)
def test_p_stands_still_under_other_adapters(name: str, tmp_path: Path) -> None:
    check_p_stands_still(fresh(), OTHERS[name](), tmp_path)


@pytest.mark.parametrize("name", INEXACT)
def test_adapters_that_are_not_exact_are_refused(name: str) -> None:
    lm = fresh()
    before = logits(lm)
    with pytest.raises(ConfigError, match=f"{name}.* is not supported"):
        Policy(lm, "{x}", SUPPORT, INEXACT[name]())
    assert torch.equal(logits(lm), before)


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="6.4 is not an adapter: give a LoraConfig, a rank, a folder with a saved adapter, or 'full'",
    ):
        Policy(fresh(), "{x}", SUPPORT, 6.4)  # type: ignore[arg-type]
    for rank in (0, -1, True):
        with pytest.raises(ConfigError, match=f"{rank} is not a rank of an adapter"):
            Policy(fresh(), "{x}", SUPPORT, rank)
    with pytest.raises(ConfigError, match=r"target_modules name layers that it can wrap"):
        Policy(fresh(), "{x}", SUPPORT, lora(target_modules=["nowhere"]))


def own_tensors(lm: LanguageModel, config: Any) -> set[str]:
    """Tensors of the model that the policy has copies of."""
    model, shared = Policy(lm, "{x}", SUPPORT, config).model, {id(p) for p in lm.model.parameters()}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, p in model.named_parameters()
        if id(p) not in shared and "lora_" not in name
    }


def test_only_what_an_adapter_writes_is_copied() -> None:
    lm = fresh("gpt2", tied=True)
    assert own_tensors(lm, None) == own_tensors(lm, lora(use_dora=True)) == set()
    biases = {name for name, _ in lm.model.named_parameters() if name.endswith("bias")}
    assert own_tensors(lm, lora(bias="all")) == biases
    pissa = lora(init_lora_weights="pissa", target_modules=["c_attn"])
    assert own_tensors(lm, pissa) == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}


def test_a_config_of_the_caller_is_not_changed() -> None:
    config = lora(lora_dropout=0.1)
    Policy(fresh(), "{x}", SUPPORT, config)
    assert config.to_dict() == lora(lora_dropout=0.1).to_dict()


def test_default_lora_begins_as_p_and_pissa_too() -> None:
    lm = fresh()
    for config in (None, lora(init_lora_weights="pissa")):
        policy = Policy(lm, "{x}", SUPPORT, config)
        with torch.no_grad():
            torch.testing.assert_close(policy.model(input_ids=IDS).logits, logits(lm), rtol=0, atol=1e-4)


ROUTED = {
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 1,
        "head_dim": 8,
    },
    "phimoe": {"num_local_experts": 2},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "granitemoe": {"num_local_experts": 2},
    "gpt_oss": {"num_local_experts": 2, "head_dim": 8},
}


@pytest.mark.parametrize("family", ROUTED)
def test_default_lora_on_models_with_routers(family: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_experts_per_tok": 1,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**sizes | ROUTED[family])
    lm = LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), name=family)
    policy = Policy(lm, "{x}", SUPPORT)
    rollouts = policy.rollouts(ROWS[:1], [[" cat ran"]])
    policy.evaluate(rollouts).final(rollouts.lengths).sum().backward()
    moved = [name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("q_proj" in name for name in moved)
    policy.save_adapter(tmp_path)
    Policy(lm, "{x}", SUPPORT, tmp_path)


def test_a_saved_adapter_names_no_path_of_this_machine(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "base"
    one = fresh()
    one.model.save_pretrained(base)
    one.tokenizer.save_pretrained(base)
    lm = LanguageModel.from_pretrained(base, device="cpu")
    for name, adapter in {"lora": None, "head": lora(modules_to_save=["lm_head"]), "full": "full"}.items():
        policy = Policy(lm, "{x}", SUPPORT, adapter)
        policy.save_adapter(tmp_path / name)
        policy.load_adapter(tmp_path / name)
        for file in (tmp_path / name).rglob("*"):
            assert b"secret" not in file.read_bytes(), file.name
    assert (
        json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )
    assert lm.model.config._name_or_path == str(base), "the model itself is left as it is"
    assert lm.model.name_or_path == str(base)


def test_an_adapter_saved_over_another_is_itself(tmp_path: Path) -> None:
    lm = fresh()
    Policy(lm, "{x}", SUPPORT, lora(init_lora_weights="pissa")).save_adapter(tmp_path)
    policy = Policy(lm, "{x}", SUPPORT, lora(init_lora_weights=False))
    policy.save_adapter(tmp_path)
    again = Policy(lm, "{x}", SUPPORT, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.model(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)


def test_hub_names_stay(tmp_path: Path) -> None:
    lm = fresh()
    lm.name = "openai-community/gpt2"
    Policy(lm, "{x}", SUPPORT).save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "openai-community/gpt2"
    assert "base_model: openai-community/gpt2" in (tmp_path / "README.md").read_text()


DAMAGED: dict[str, tuple[str, bytes | None]] = {
    "no config": ("adapter_config.json", None),
    "a cut config": ("adapter_config.json", b'{"peft_type": "LO'),
    "a config that is a list": ("adapter_config.json", b"[1, 2]"),
    "a config of bytes": ("adapter_config.json", b"\xff\xfe\x00"),
    "a config without a type": ("adapter_config.json", b'{"r": 4}'),
    "a config of an unknown type": ("adapter_config.json", b'{"peft_type": "NEWEST", "r": 4}'),
    "no weights": ("adapter_model.safetensors", None),
    "cut weights": ("adapter_model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
    "cut initial weights": ("adapter_initial.safetensors", b"\x10"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_folders_are_one_error(damage: str, tmp_path: Path) -> None:
    lm = fresh()
    Policy(lm, "{x}", SUPPORT, lora(init_lora_weights="pissa")).save_adapter(tmp_path)
    name, content = DAMAGED[damage]
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        Policy(lm, "{x}", SUPPORT, tmp_path)


def test_folders_of_another_kind_are_one_error(tmp_path: Path) -> None:
    lm = fresh()
    Policy(lm, "{x}", SUPPORT, OTHERS["IA3"]()).save_adapter(tmp_path / "ia3")
    Policy(lm, "{x}", SUPPORT, tmp_path / "ia3")
    with pytest.raises(CheckpointError, match="missing or unexpected"):
        Policy(lm, "{x}", SUPPORT).load_adapter(tmp_path / "ia3")
    with pytest.raises(CheckpointError, match="adapter belongs to another model"):
        Policy(fresh("gpt2"), "{x}", SUPPORT, tmp_path / "ia3")
    (tmp_path / "prefix").mkdir()
    INEXACT["PREFIX_TUNING"]().save_pretrained(tmp_path / "prefix")
    (tmp_path / "prefix" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "ia3" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="PREFIX_TUNING is not an adapter of weights"):
        Policy(lm, "{x}", SUPPORT, tmp_path / "prefix")
