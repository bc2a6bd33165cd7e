"""What sharded training refuses before any weight is sharded. In one process: the count of the others is made up.
Refusals that need several are in test_sharded.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from trainers import make_trainer
from transformers import Phi3Config, Phi3ForCausalLM

from amortlm import EM, GFNConfig, GFNTrainer, LanguageModel, Policy, Support
from amortlm.engine.adapter import default_lora
from amortlm.errors import ConfigError
from amortlm.train import sharding

WORDS = Support(stop=".", max_tokens=3)
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Others(SimpleNamespace):
    """Two processes, as this one would see them, of which the other has loaded another model."""

    count = 2

    def gather(self, names: list[str]) -> list[list[str]]:
        return [names, ["other"]]


def refusal(
    lm: LanguageModel, folder: Path, adapter: Any = 2, change: Callable[[GFNConfig], None] | None = None
) -> str:
    """Why such a run is not sharded. The last refusal, of weights that differ, is that of a run that is all right."""
    args = GFNConfig(output_dir=str(folder), fsdp=True, use_cpu=True)
    if change is not None:
        change(args)
    with pytest.raises(ConfigError) as found:
        sharding.shard(args, Policy(lm, "{x}", WORDS, adapter), Others(), ["names"])  # type: ignore[arg-type]
    return str(found.value)


@pytest.mark.parametrize("adapter", [2, "full", LoraConfig(**LORA, use_dora=True)])
def test_the_control_gets_past_all_others(one_lm: LanguageModel, tmp_path: Path, adapter: Any) -> None:
    said = refusal(one_lm, tmp_path, adapter)
    assert "the processes have loaded different weights: make the LanguageModel before GFNConfig" in said


def test_one_process(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is one process; start several, with torchrun or accelerate"):
        make_trainer(one_lm, tmp_path, fsdp=True)


def test_draws_from_older_weights(one_lm: LanguageModel, tmp_path: Path) -> None:
    def stale(args: GFNConfig) -> None:
        args.rollout, args.max_staleness = "http://127.0.0.1:1", 1

    assert "checked with these, which are gone: set max_staleness=0" in refusal(one_lm, tmp_path, 2, stale)


def test_fp16(one_lm: LanguageModel, tmp_path: Path) -> None:
    def half(args: GFNConfig) -> None:
        args.fp16 = True  # not when it is made: without a GPU that is another refusal

    assert "fp16 is not supported: set bf16, or neither" in refusal(one_lm, tmp_path, 2, half)


def test_a_quantised_model(one_lm: LanguageModel, tmp_path: Path) -> None:
    lm = one_lm.with_model(copy.deepcopy(one_lm.model))
    layer = lm.model.model.layers[0].mlp.up_proj
    args = GFNConfig(output_dir=str(tmp_path), fsdp=True, use_cpu=True)
    policy = Policy(lm, "{x}", WORDS, 2)
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    message = "is quantised and cannot be sharded: load it with dtype=torch.bfloat16"
    with pytest.raises(ConfigError, match=message):
        sharding.shard(args, policy, Others(), ["names"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(task_type="CAUSAL_LM"),
        LoraConfig(**LORA, bias="all"),
        LoraConfig(**LORA | {"target_modules": ["q_proj"]}, modules_to_save=["lm_head"]),
        LoraConfig(**LORA | {"target_modules": ["q_proj"]}, trainable_token_indices=[3]),
    ],
    ids=["ia3", "biases", "saved", "tokens"],
)
def test_adapters_that_leave_no_p(one_lm: LanguageModel, tmp_path: Path, adapter: Any) -> None:
    said = refusal(one_lm, tmp_path, adapter)
    assert "p would not be the model with this adapter switched off: train plain LoRA" in said


def test_longrope(one_lm: LanguageModel, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=one_lm.vocab_size,
        max_position_embeddings=64,
        original_max_position_embeddings=24,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}
        | {"original_max_position_embeddings": 24},
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    lm = LanguageModel(Phi3ForCausalLM(config), one_lm.tokenizer, name="phi")
    said = refusal(lm, tmp_path)
    assert "phi has other rotary embeddings for long texts (LongRoPE)" in said
    assert "leave fsdp out" in said


def test_em(one_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="EM changes p, .*: leave fsdp out, or train without EM"):
        EM(
            one_lm,
            target=one_lm.log_prob("{z}{y}", given="{x}"),
            prompt="{x}",
            support=WORDS,
            train_dataset=[{"x": "a", "y": " b"}],
            args=GFNConfig(output_dir=str(tmp_path), fsdp=True, use_cpu=True),
            adapter=default_lora(2),
        )


@pytest.mark.parametrize("other", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_by_accelerate(
    one_lm: LanguageModel, tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --use_deepspeed` makes the trainer see it."""
    create = GFNTrainer.create_accelerator_and_postprocess

    def with_another(trainer: GFNTrainer) -> None:
        create(trainer)
        setattr(trainer, other, True)

    monkeypatch.setattr(GFNTrainer, "create_accelerator_and_postprocess", with_another)
    with pytest.raises(ConfigError, match="accelerate launch with DeepSpeed or .*use torchrun.*fsdp=True"):
        make_trainer(one_lm, tmp_path)


def test_settings_that_accelerate_refuses(one_lm: LanguageModel, tmp_path: Path) -> None:
    def odd(args: GFNConfig) -> None:
        vars(args)["fsdp_plugin_args"] = {"fsdp_version": 2, "auto_wrap_policy": "BY_NAME"}

    assert refusal(one_lm, tmp_path, 2, odd).startswith("fsdp: ")


def test_versions_of_transformers_without_fsdp_settings(one_lm: LanguageModel, tmp_path: Path) -> None:
    def old(args: GFNConfig) -> None:
        vars(args)["fsdp_plugin_args"] = None

    said = refusal(one_lm, tmp_path, 2, old)
    assert "fsdp needs transformers 5.23 or newer; `accelerate launch --use_fsdp` does not" in said
