"""The memory of an update that is planned without weights, against that of a real one: numbers of weights exactly, what
autograd keeps within MARGIN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from four_bits import load, storages
from peft import LoraConfig
from torch import Tensor
from trainers import make_trainer
from vllm_model import save_tiny_gpt2, save_tiny_llama

from amortlm import LanguageModel, Policy, Support
from amortlm.cli import main
from amortlm.engine.adapter import default_lora
from amortlm.engine.footprint import Footprint, Shape, _layers
from amortlm.engine.packs import Sharing
from amortlm.engine.quantised import packed_bytes
from amortlm.errors import ConfigError
from amortlm.language_model import without_weights
from amortlm.train.plan import MOMENTS, plan
from amortlm.train.spec import RunSpec
from amortlm.types import Rollouts

MARGIN = 0.2
SHAPES = {"short": Shape(2, 5, 8, 4), "long": Shape(3, 33, 6, 20)}
ADAPTERS = {
    "lora": default_lora(4),
    "full": "full",
    "some": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(path)
    return str(path)


def rollouts(policy: Policy, shape: Shape) -> Rollouts:
    """Completions of the longest length."""
    word = policy.lm.encode_continuation("b")
    rows = [{"x": " the" * shape.prompt_tokens, "n": i} for i in range(shape.prompts)]
    return policy.rollouts(rows, [[word * shape.completion_tokens] * shape.completions] * shape.prompts)


def kept(policy: Policy, drawn: Rollouts) -> tuple[int, int]:
    """(bytes that autograd keeps of an evaluation, without the weights and the logits; bytes of the logits)"""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.evaluate(drawn)
    logits = [x for x in found.values() if x.dim() == 3 and x.shape[-1] == policy.lm.vocab_size]
    assert len(logits) == 1
    all_bytes = sum(x.untyped_storage().nbytes() for x in found.values())
    return all_bytes - logits[0].nbytes, logits[0].nbytes


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_what_an_update_takes(folder: str, adapter: str, shape: str) -> None:
    lm, size = LanguageModel.from_pretrained(folder), SHAPES[shape]
    support = Support(stop=".", max_tokens=size.completion_tokens)
    policy = Policy(lm, "{x}", support, ADAPTERS[adapter])
    drawn = rollouts(policy, size)
    assert {len(p) for p in policy.encode_rows(drawn.rows)} == {size.prompt_tokens}
    blank = without_weights(folder)
    model = Policy(blank, "{x}", support, ADAPTERS[adapter]).model
    found = Footprint.of(blank.model, model, size)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert found.parameters == sum(p.numel() for p in lm.model.parameters())
    assert found.trained == sum(p.numel() for p in trained)
    assert found.weights == 4 * found.parameters
    assert found.own == 4 * found.trained
    measured, logits = kept(policy, drawn)
    assert found.logits == logits
    assert found.kept == pytest.approx(measured, rel=MARGIN)
    policy.sharing = Sharing(spans=False)  # no prompts are shared
    assert found.kept_whole == pytest.approx(kept(policy, drawn)[0], rel=MARGIN)
    # The control: with half more tokens it would not fit.
    other = Shape(size.prompts, size.prompt_tokens, size.completions, size.completion_tokens * 3 // 2)
    assert Footprint.of(blank.model, model, other).kept > measured * (1 + MARGIN)


def test_what_enters_the_layers(folder: str) -> None:
    """The largest part of what is kept with activation checkpointing."""
    lm, size = LanguageModel.from_pretrained(folder), SHAPES["long"]
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=size.completion_tokens), default_lora(4))
    entered: list[int] = []
    layers = _layers(policy.model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: entered.append(given[0].nbytes))
    policy.activation_checkpointing_enable()
    policy.evaluate(rollouts(policy, size))
    blank = without_weights(folder)
    found = Footprint.of(blank.model, Policy(blank, "{x}", policy.support_spec, default_lora(4)).model, size)
    assert found.kept_checkpointed == sum(entered) + found.kept_whole // len(layers)


def test_what_adam_keeps(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.optimizer is not None
    state: dict[Any, dict[str, Tensor]] = trainer.optimizer.state
    moments = sum(x.nbytes for each in state.values() for x in each.values() if x.dim() > 0)
    trained = sum(p.nbytes for p in trainer.policy.parameters() if p.requires_grad)
    assert moments == MOMENTS * trained


def test_a_plan_of_a_run(folder: str) -> None:
    spec = RunSpec(
        model=folder,
        prompt="{x}",
        target=[{"log_prob": {"of": "{z}", "given": "{x}"}}],
        support={"stop": ".", "max_tokens": 7},
        data=[{"x": " the the the"}, {"x": "a"}],
        adapter=4,
    )
    found, half = plan(spec), plan(spec, "bfloat16")
    assert found.shape == Shape(2, 3, 32, 7)
    one, eight = found.held(1), found.held(8)
    assert eight["weights of p"] == one["weights of p"] // 8
    assert one["a gathered block"] == 0 < eight["a gathered block"]
    assert one["kept for backward"] < eight["kept for backward"]
    assert found.footprint.block < found.footprint.weights
    assert half.held(1)["weights of p"] * 2 == one["weights of p"]
    assert sum(one.values()) == pytest.approx(found.rows()[-1][1] * 2**30)  # type: ignore[operator]


def test_a_plan_of_4_bits(folder: str, tmp_path: Path) -> None:
    """The bytes of the weights as they are, and what is kept within the margin of other plans."""
    lm, size = load(folder), SHAPES["long"]
    support = Support(stop=".", max_tokens=size.completion_tokens)
    policy, blank = Policy(lm, "{x}", support, default_lora(4)), without_weights(folder)
    found = Footprint.of(blank.model, Policy(blank, "{x}", support, default_lora(4)).model, size)
    assert found.kept == pytest.approx(kept(policy, rollouts(policy, size))[0], rel=MARGIN)
    save_tiny_gpt2(tmp_path)  # its matrices are no nn.Linear before
    for place in (folder, str(tmp_path)):
        whole = without_weights(place).model
        assert packed_bytes(whole) == sum(storages(load(place).model).values())
        assert packed_bytes(whole) < sum(p.nbytes for p in whole.parameters()) / 3


def test_a_plan_of_a_run_in_4_bits(folder: str) -> None:
    spec = RunSpec(
        model=folder,
        prompt="{x}",
        target=[{"log_prob": {"of": "{z}", "given": "{x}"}}],
        support={"stop": ".", "max_tokens": 7},
        data=[{"x": "a"}],
        adapter=4,
    )
    found, half = plan(spec, "nf4"), plan(spec, "bfloat16")
    low = load(folder, bnb_4bit_compute_dtype=torch.bfloat16)
    assert found.held(1)["weights of p"] == sum(storages(low.model).values())
    others = {name for name, size in found.held(1).items() if size != half.held(1)[name]}
    assert others == {"weights of p"}
    assert [row[0] for row in found.rows()] == [row[0] for row in half.rows()]
    assert {len(row) for row in found.rows()} == {2}  # packed weights are not sharded
    assert "parameters in nf4" in str(found)


def test_the_command_loads_nothing(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(LanguageModel, "from_pretrained", None)
    assert main(["train", "numbers", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "p has 3,148,224 parameters in float32" in said
    assert "64 devices" in said


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config and tokenizer"):
        without_weights(str(tmp_path))
