"""A frozen model in 4 bits (bitsandbytes) as p, with LoRA for q: exact, shared, trained, saved, planned, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bits import load, packing, storages
from peft import LoraConfig
from reference import random_rollouts
from torch import Tensor
from trainers import make_trainer, weights
from transformers import BitsAndBytesConfig
from vllm_model import save_tiny_gpt2, save_tiny_llama

from amortlm import GFNConfig, LanguageModel, Policy, Posterior, Support
from amortlm.card.card import base_of
from amortlm.engine import quantised
from amortlm.engine.exactness import TOLERANCE, Check
from amortlm.engine.export import merged_file
from amortlm.engine.packs import Sharing
from amortlm.errors import CheckpointError, ConfigError, MissingExtraError
from amortlm.policy.laws import check_policy, check_sampler, examine_sampling
from amortlm.train import sharding

SUPPORT = Support(stop=[".", "!"], min_tokens=1, max_tokens=3, allowed_tokens=[" cat", " dog", "b"])
ROW = {"x": "a b", "y": " c"}
LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SAVERS = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, save in SAVERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        save(found[name])
    return found


@pytest.fixture(scope="module", params=SAVERS)
def lm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    return load(folders[request.param])


@pytest.fixture
def llama(folders: dict[str, Path]) -> LanguageModel:
    return load(folders["llama"])


def moved(lm: LanguageModel) -> Policy:
    """A policy far from p."""
    torch.manual_seed(3)
    policy = Policy(lm, "{x}", SUPPORT, LoraConfig(**LORA))
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    return policy


def log_q(policy: Policy) -> Tensor:
    drawn = random_rollouts(policy.lm, SUPPORT, [ROW], per_row=8)
    with torch.no_grad():
        return policy.evaluate(drawn).final(drawn.lengths)


def test_every_kind_of_pass_is_exact(lm: LanguageModel) -> None:
    found = lm.exactness
    assert all(f.exact for f in found.findings), str(found)
    assert found.sharing == Sharing()
    assert examine_sampling(lm).holds


def test_p_is_the_model_in_4_bits(folders: dict[str, Path], llama: LanguageModel) -> None:
    """Its log-probabilities are those of a model with the dequantised weights, not those of the model before."""
    from bitsandbytes.functional import dequantize_4bit

    whole = LanguageModel.from_pretrained(folders["llama"])
    text = Check(llama.model, "").texts[0]
    before, found = (Check(each.model, "").alone(text) for each in (whole, llama))
    packed = dict(llama.model.named_parameters())
    for name, p in whole.model.named_parameters():
        if hasattr(packed[name], "quant_state"):
            p.data = dequantize_4bit(packed[name].data, packed[name].quant_state)
    assert (Check(whole.model, "").alone(text) - found).abs().max() < 1e-4
    assert (before - found).abs().max() > 0.1, "control"


def test_laws_of_policy_and_sampler(lm: LanguageModel) -> None:
    policy = moved(lm)
    check_policy(policy, [ROW, {"x": "the cat"}])
    check_sampler(policy.sampler, policy, ROW, num_samples=500)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_weight(folders: dict[str, Path], double: bool) -> None:
    """4.5 bits: 4, and a scale in float32 for 64 weights. Scales that are quantised themselves: 4.13 in the limit."""
    lm = load("embedded", bnb_4bit_use_double_quant=double)
    packed = [p for p in lm.model.parameters() if hasattr(p, "quant_state")]
    numbers = sum(p.quant_state.shape.numel() for p in packed)
    others = sum(p.nbytes for p in lm.model.parameters() if not hasattr(p, "quant_state"))
    bits = 8 * (sum(storages(lm.model).values()) - others) / numbers
    assert bits == pytest.approx(4.127 if double else 4.5, abs=1e-3)
    assert quantised.numbers(lm.model) == 3_148_224
    assert "3.15 M parameters in 4 bits (nf4)" in str(base_of(lm))


def test_a_policy_shares_the_packed_weights(lm: LanguageModel) -> None:
    policy = Policy(lm, "{x}", SUPPORT, LoraConfig(**LORA))
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    own, both = (sum(storages(*models).values()) for models in ([lm.model], [lm.model, policy.model]))
    assert both == own + trained
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_moves_the_adapter_alone(llama: LanguageModel, tmp_path: Path, checkpointing: bool) -> None:
    frozen = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    scales = [state.absmax.clone() for state in quantised.states(llama.model)]
    trainer = make_trainer(llama, tmp_path, max_steps=2, gradient_checkpointing=checkpointing)
    before = weights(trainer).clone()
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in llama.model.named_parameters())
    assert all(map(torch.equal, scales, (state.absmax for state in quantised.states(llama.model))))
    assert storages(trainer.policy.model).items() >= storages(llama.model).items()


def test_the_gradient_is_that_of_the_dequantised_model(folders: dict[str, Path], lm: LanguageModel) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    name = "gpt2" if lm.model.config.model_type == "gpt2" else "llama"
    whole = LanguageModel.from_pretrained(folders[name])
    for place, module in whole.model.named_modules():
        packed = lm.model.get_submodule(place)
        if hasattr(packed, "quant_state"):
            weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    gradients = []
    for policy in (moved(lm), moved(whole)):
        drawn = random_rollouts(policy.lm, SUPPORT, [ROW], per_row=4)
        policy.evaluate(drawn).final(drawn.lengths).sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))
    assert any(float(g.abs().max()) > 0.1 for g in gradients[0]), "control"


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_saved_posterior_is_loaded_in_4_bits(
    folders: dict[str, Path], tmp_path: Path, storage: str
) -> None:
    policy = moved(load(folders["llama"], bnb_4bit_quant_storage=storage))
    Posterior(policy, None).save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path)
    assert quantised.settings(again.lm.model) == quantised.settings(policy.lm.model)
    assert torch.equal(log_q(again.policy), log_q(policy))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.5 * sum(p.nbytes for p in policy.parameters() if p.requires_grad)  # no base in it


def test_another_quantisation_is_said(
    folders: dict[str, Path], llama: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = moved(llama)
    Posterior(policy, None).save_pretrained(tmp_path)
    Posterior.from_pretrained(tmp_path, lm=llama)
    assert not caplog.messages
    other = Posterior.from_pretrained(tmp_path, lm=LanguageModel.from_pretrained(folders["llama"]))
    assert "was trained on weights quantised with" in caplog.text
    assert (log_q(other.policy) - log_q(policy)).abs().max() > 1e-2, "control"


@pytest.mark.parametrize(
    "wrong", [["nf4"], {}, {"bnb_4bit_quant_type": "nf3"}, {"bnb_4bit_compute_dtype": "compile"}, {"more": 1}]
)
def test_a_saved_quantisation_is_checked(llama: LanguageModel, tmp_path: Path, wrong: Any) -> None:
    Posterior(moved(llama), None).save_pretrained(tmp_path)
    file = tmp_path / "posterior.json"
    spec = json.loads(file.read_text())
    spec["quantization"] = wrong if not isinstance(wrong, dict) or not wrong else spec["quantization"] | wrong
    file.write_text(json.dumps(spec))
    with pytest.raises((CheckpointError, ConfigError), match="quantization"):
        Posterior.from_pretrained(tmp_path)


def test_a_coarser_type_inside_is_allowed_for(folders: dict[str, Path]) -> None:
    """Numbers between packed layers may be in another type than those inside them, which decide what is exact."""
    lm = LanguageModel.from_pretrained(
        folders["gpt2"],
        dtype=torch.float32,
        quantization_config=packing(bnb_4bit_compute_dtype=torch.bfloat16),
    )
    kinds = [p.dtype for p in lm.model.parameters()]
    assert Check(lm.model, "").tolerance == TOLERANCE[torch.bfloat16]
    assert lm.exactness.sharing.packed
    assert [p.dtype for p in lm.model.parameters()] == kinds  # also those of the biases
    same = load(folders["gpt2"], bnb_4bit_compute_dtype=torch.bfloat16)
    assert same.model.dtype == torch.bfloat16


def test_weights_are_not_packed_anew(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bitsandbytes would, in the first pass without gradient, for a kernel without gradient."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    seen: list[object] = []
    monkeypatch.setattr(
        modules, "_convert_weight_packed_for_cpu", lambda *given: seen.append(given) or given[:2]
    )
    policy = moved(load(folders["llama"]))
    log_q(policy)
    assert not seen
    for module in policy.model.modules():
        module.support_avx512bf16_for_cpu = True
    log_q(policy)
    assert seen, "control"


@pytest.mark.parametrize(
    "adapter",
    [
        "full",
        LoraConfig(**LORA, bias="all"),
        LoraConfig(**LORA, init_lora_weights="olora"),
        LoraConfig(**LORA, init_lora_weights="pissa"),
    ],
    ids=["full", "biases", "olora", "pissa"],
)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_other_adapters_are_refused(folders: dict[str, Path], adapter: Any, storage: str) -> None:
    lm = load(folders["llama"], bnb_4bit_quant_storage=storage)
    with pytest.raises(ConfigError, match="is quantised: train plain LoRA.*dtype=torch.bfloat16"):
        Policy(lm, "{x}", SUPPORT, adapter)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_merging_and_sharding_are_refused(folders: dict[str, Path], tmp_path: Path, storage: str) -> None:
    lm = load(folders["llama"], bnb_4bit_quant_storage=storage)
    policy = moved(lm)
    with pytest.raises(ConfigError, match="cannot be merged into a quantised model"):
        merged_file(policy.model, lm.model, torch.float32, False)
    with pytest.raises(ConfigError, match="cannot be merged into a quantised model"):
        policy.model.merge_and_unload()
    processes = type("Two", (), {"count": 2})()
    args = GFNConfig(output_dir=str(tmp_path), fsdp=True, use_cpu=True)
    with pytest.raises(ConfigError, match="is quantised and cannot be sharded"):
        sharding.shard(args, policy, processes, ["names"])


def test_other_quantisations_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="embeddings and output head must not be quantised"):
        load(folders["llama"], llm_int8_skip_modules=["q_proj"])
    with pytest.raises(ConfigError, match="in 8 bits, what is rounded in a text depends on the other texts"):
        LanguageModel.from_pretrained(
            folders["llama"], quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)


def test_a_missing_extra_is_named(without_bitsandbytes: None, folders: dict[str, Path]) -> None:
    with pytest.raises(MissingExtraError, match=r"needs bitsandbytes: pip install 'amortlm\[qlora\]'"):
        load(folders["llama"])
    LanguageModel.from_pretrained(folders["llama"])
