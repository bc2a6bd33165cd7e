"""GGUF files: what is loaded computes what the file says, or is refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from reference import LETTERS
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Posterior, Support
from amortlm.engine.gguf import check_spaces
from amortlm.errors import ConfigError, ModelError
from amortlm.text.template import PromptTemplate
from amortlm.versions import TRANSFORMERS

WORDS = [*"<>.!", *LETTERS, "Ġ", "Ċ"]
TOKENS = ["<unk>", "<s>", "</s>", *WORDS, "Ġa", "th", "the"]
MERGES = ["Ġ a", "t h", "th e"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
HEADS, KV_HEADS, LAYERS = 4, 2, 2

pytestmark = pytest.mark.skipif(
    TRANSFORMERS < (5, 18), reason="transformers 5.17 makes tokenizers that lose spaces"
)

Change = Callable[[gguf.GGUFWriter], None]


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(TOKENS),
        max_position_embeddings=96,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, in the order in which llama.cpp turns them."""
    size = weight.shape[0] // heads
    order = [
        h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def write(path: Path, model: LlamaForCausalLM, kind: Kind, change: Change = lambda writer: None) -> None:
    """The model as a file, its matrices quantised; the weights of `model` become what the file can hold."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy().copy()
            if values.ndim == 2:
                values = gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape)
                parameter.copy_(torch.from_numpy(values))
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            if heads:
                values = interleaved(values, heads)
            stored = gguf.quantize(values, kind) if values.ndim == 2 else values
            place = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(place, stored, raw_dtype=kind if values.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path, model = tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(tied=True)
    write(path, model, Kind.Q8_0)
    return path, model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_log_probs_are_those_of_the_dequantised_weights(tmp_path: Path, tied: bool, kind: Kind) -> None:
    model = llama(tied)
    write(tmp_path / "tiny.gguf", model, kind)
    lm = LanguageModel.from_pretrained(tmp_path / "tiny.gguf")
    tokens = torch.tensor([lm.tokenizer("the cat saw a dog.").input_ids])
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
        assert (lm.model(tokens).logits.log_softmax(-1) - expected).abs().max() < 1e-5
    assert lm.model.dtype == torch.float32


def test_tokenizer_and_chat_template_come_with_it(
    file: tuple[Path, LlamaForCausalLM], capfd: pytest.CaptureFixture[str]
) -> None:
    lm = LanguageModel.from_pretrained(file[0])
    assert "quantizing" not in capfd.readouterr().err, "no bar in a pipe"
    assert lm.tokenizer.convert_ids_to_tokens(lm.encode_continuation(" athe")) == ["Ġa", "the"]
    assert lm.decode(lm.encode_continuation(" a cat.")) == " a cat."
    assert {0, 1, 2} <= lm.special_ids
    prompt = PromptTemplate([{"role": "user", "content": "{x}"}])
    assert lm.tokenizer.decode(lm.encode_prompt(prompt, {"x": "a cat"})) == "<s>a cat</s><s>"


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_trains_saves_and_loads(file: tuple[Path, LlamaForCausalLM], tmp_path: Path, adapter: str) -> None:
    lm = LanguageModel.from_pretrained(file[0])
    trainer = GFNTrainer(
        lm,
        target=lm.log_prob("{z}{y}", given="{x}"),
        prompt="{x}",
        support=Support(stop=".", max_tokens=3),
        train_dataset=[{"x": "the cat", "y": " a."}],
        args=GFNConfig(output_dir=str(tmp_path / "run"), num_samples=4, max_steps=2),
        adapter="full" if adapter == "full" else None,
    )
    trainer.train()
    row = trainer.train_dataset[0]
    rollouts = trainer.posterior.policy.sample([row], 4, seed=0)[0]
    expected = trainer.posterior.policy.evaluate(rollouts).log_pf
    trainer.posterior.save_pretrained(tmp_path / "saved")
    again = Posterior.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again.policy.evaluate(rollouts).log_pf, expected, atol=1e-6)


def altered(key: str, value: Any) -> Change:
    return lambda w: (w.add_string if isinstance(value, str) else w.add_float32)(f"llama.{key}", value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
        (altered("rope.scaling.type", "yarn"), "rope.scaling.type"),
        (altered("rope.scaling.factor", 8.0), "rope.scaling.factor"),
        (altered("attention.scale", 0.3), "attention.scale"),
        (altered("final_logit_softcapping", 30.0), "final_logit_softcapping"),
        (lambda w: w.add_sliding_window(8), "sliding_window"),
    ],
)
def test_what_transformers_passes_over_is_refused(tmp_path: Path, change: Change, named: str) -> None:
    write(tmp_path / "tiny.gguf", llama(tied=True), Kind.F32, change)
    with pytest.raises(ModelError, match=f"{named}.*safetensors"):
        LanguageModel.from_pretrained(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("fault", ["empty", "cut", "no gguf", "header only", "unknown architecture"])
def test_a_broken_file_is_one_sentence(
    file: tuple[Path, LlamaForCausalLM], tmp_path: Path, fault: str
) -> None:
    good, path = file[0].read_bytes(), tmp_path / "broken.gguf"
    content = {
        "empty": b"",
        "cut": good[: len(good) * 2 // 3],
        "no gguf": b"not a model at all" * 100,
        "header only": good[:64],
        "unknown architecture": good.replace(b"llama", b"llamx"),
    }
    path.write_bytes(content[fault])
    with pytest.raises(ConfigError, match="cannot load a causal LM from .*broken.gguf"):
        LanguageModel.from_pretrained(path)


def test_a_tokenizer_that_loses_spaces_is_refused(models: dict[str, LanguageModel]) -> None:
    lm = copy.copy(models["gpt2-tied"])
    check_spaces(lm)
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    byte_level, strip = lm.tokenizer.backend_tokenizer.decoder, decoders.Strip(" ", 1, 0)
    lm.tokenizer.backend_tokenizer.decoder = decoders.Sequence([byte_level, strip])
    with pytest.raises(ModelError, match="loses spaces"):
        check_spaces(lm)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", "none.gguf", "models/none.gguf"):
        with pytest.raises(ConfigError, match="there is no such file"):
            LanguageModel.from_pretrained(path)
    with pytest.raises(ConfigError, match="cannot load a causal LM from 'user/name/none.gguf'"):
        LanguageModel.from_pretrained("user/name/none.gguf")


def test_without_the_reader_the_extra_is_named(
    file: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ConfigError, match=r"amortlm\[gguf\]"):
        LanguageModel.from_pretrained(file[0])


def test_a_model_without_a_head_is_refused(tmp_path: Path, models: dict[str, LanguageModel]) -> None:
    """Not only GGUF: transformers would fill in random numbers, with a warning."""
    lm = models["llama-untied"]
    lm.model.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lm_head.weight"):
        LanguageModel.from_pretrained(tmp_path)
