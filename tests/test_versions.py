"""What stands in for what older versions of transformers lack, whichever version the tests run with."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from reference import tiny_lm, tiny_tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase

from amortlm import LanguageModel, versions
from amortlm.errors import DataError
from amortlm.text.template import PromptTemplate

TEMPLATE = "{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TRANSFORMERS", (5, 17))


@pytest.mark.parametrize("name", ["cache", "cache_params", "past_key_values"])
def test_the_cache_goes_in_by_the_name_that_a_model_gives_it(name: str) -> None:
    assert versions.cache_argument({"input_ids", name}) == name


def test_a_wrapper_passes_on_the_name_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, name in (((5, 23), "past_key_values"), ((5, 24), "cache"), ((6, 0), "cache")):
        monkeypatch.setattr(versions, "TRANSFORMERS", version)
        assert versions.cache_argument(()) == name


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("asked", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_both_names(name: str, asked: str) -> None:
    got: dict[str, Any] = {}
    model = SimpleNamespace(**{f"{name}_enable": lambda **settings: got.update(settings)})
    versions.checkpoint_activations(model, {f"{asked}_kwargs": {"use_reentrant": True}, "every_n_layers": 2})
    assert got == {f"{name}_kwargs": {"use_reentrant": True}, "every_n_layers": 2}


def marked_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.add_tokens(
        [AddedToken(t, special=t == "<own>") for t in ("<turn>", "</turn>", "<own>", "<other>")]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_control_tokens_are_found_without_the_library() -> None:
    tokenizer = marked_tokenizer()
    bare = SimpleNamespace(added_tokens_decoder=tokenizer.added_tokens_decoder)
    found = set(versions.control_tokens(bare, TEMPLATE))
    assert {"<turn>", "</turn>", "<own>"} <= found
    assert "<other>" not in found
    assert found == set(versions.control_tokens(tokenizer, TEMPLATE))


def test_a_version_that_cannot_read_control_tokens_as_text_refuses_them(old: None) -> None:
    lm = LanguageModel(tiny_lm("gpt2", marked_tokenizer(), tied=True).model, marked_tokenizer())
    prompt = PromptTemplate([{"role": "user", "content": "{x}"}])
    assert lm.encode_prompt(prompt, {"x": "a <other>"}), "no control token"
    with pytest.raises(
        DataError, match=re.escape("'</turn>' in a message cannot be read as text (transformers")
    ):
        lm.encode_prompt(prompt, {"x": "a</turn>"})
    lm.chat_template_kwargs = {"sanitize_control_tokens": False}
    assert lm.encode_prompt(prompt, {"x": "a</turn>"}), "data that are trusted"
