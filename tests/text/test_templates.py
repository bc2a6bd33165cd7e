"""Templates, prompts and their tokens: what they fill in, and the errors that say how to repair them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
import torch
from reference import CONTEXT, tiny_policy, tiny_tokenizer

from amortlm.errors import (
    AmortLMError,
    ConfigError,
    DataError,
    PromptTooLongError,
    TemplateError,
    nearest,
)
from amortlm.language_model import LanguageModel
from amortlm.support import Support
from amortlm.text.template import PromptTemplate, Template


def test_a_template_splits_around_the_latent() -> None:
    template = Template("Q: {x}{{}} A:{z} so {y}.")
    assert template.split({"x": "one", "y": 2}) == ("Q: one{} A:", " so 2.")
    assert template.columns == {"x", "y"}
    assert template.has_latent
    assert Template("no latent {x}").split({"x": "!"}) == ("no latent !", "")


def test_values_are_not_templates() -> None:
    assert Template("{x}{z}").split({"x": "{y} {z} {{"}) == ("{y} {z} {{", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{x", "{{ for a literal brace"),
        ("x}", "{{ for a literal brace"),
        ("{}", "not a plain column name"),
        ("{0}", "not a plain column name"),
        ("{x.y}", "not a plain column name"),
        ("{x!r}", "write {name} without format or conversion, and {{ for a literal brace"),
        ("{x:>3}", "write {name} without format or conversion"),
        ("{z} and {z}", "{z} may appear only once"),
    ],
)
def test_malformed_templates_are_refused(text: str, message: str) -> None:
    with pytest.raises(TemplateError) as e:
        Template(text)
    assert message in str(e.value)
    assert repr(text) in str(e.value)


def test_an_unknown_placeholder_names_the_nearest_column() -> None:
    with pytest.raises(
        TemplateError, match=r"uses \{begining\}.*did you mean 'beginning'\? Valid: beginning, end, z"
    ):
        Template("{begining}").split({"beginning": "a", "end": "b"})


def test_an_empty_value_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"column 'x' is empty \(None\) in a row; drop or fill such rows"):
        Template("{x}").split({"x": None})
    assert Template("{x}|").split({"x": ""}) == ("|", ""), "an empty text is a value"


EMPTY = {
    "None": None,
    "NaN": float("nan"),
    "numpy NaN": np.float32("nan"),
    "pandas NA": pd.NA,
    "pandas NaT": pd.NaT,
    "numpy NaT": np.datetime64("NaT"),
    "decimal NaN": Decimal("NaN"),
    "torch NaN": torch.tensor(float("nan")),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_cells_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"column 'x' is empty \(.*\) in a row; drop or fill such rows"):
        Template("{x}").split({"x": EMPTY[name]})


VALUES = {
    "7": 7,
    "0.5": 0.5,
    "True": True,
    "1.5": np.float64(1.5),
    "3": np.int64(3),
    "4": torch.tensor(4),
    "2020-02-01": date(2020, 2, 1),
    "2020-02-01 03:00:00": datetime(2020, 2, 1, 3),
    "2020-02-01T00:00:00.000000000": np.datetime64("2020-02-01", "ns"),
    "1.10": Decimal("1.10"),
    "a b": np.str_("a b"),
    "a/b": PurePosixPath("a/b"),
}


@pytest.mark.parametrize("text", VALUES)
def test_numbers_and_dates_are_written_as_text(text: str) -> None:
    assert Template("{x}").split({"x": VALUES[text]}) == (text, "")


NOT_TEXT = {
    "list": ["a"],
    "dict": {"a": 1},
    "bytes": b"a",
    "set": {"a"},
    "tuple": ("a",),
    "ndarray": np.array([1, 2]),
    "Tensor": torch.tensor([1, 2]),
    "object": object(),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_values_that_are_not_text_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"column 'x' holds a {name}, not text; turn it into the text"):
        Template("{x}").split({"x": NOT_TEXT[name]})


def test_infinite_cells_and_half_characters_are_refused() -> None:
    for value in (float("inf"), np.float64("-inf"), Decimal("Infinity")):
        with pytest.raises(DataError, match="column 'x' is infinite"):
            Template("{x}").split({"x": value})
    with pytest.raises(DataError, match="half a character"):
        Template("{x}").split({"x": "a\ud800"})
    assert Template("{x}").split({"x": "inf \U0001f600"}) == ("inf \U0001f600", "")


def test_messages_are_filled_in() -> None:
    prompt = PromptTemplate([{"role": "system", "content": "be {how}"}, {"role": "user", "content": "{x}"}])
    assert prompt.columns == {"how", "x"}
    assert prompt.messages({"how": "kind", "x": "hi"}) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]
    assert PromptTemplate("{x}").messages({"x": "hi"}) is None


def test_the_latent_cannot_be_inside_messages() -> None:
    with pytest.raises(
        TemplateError, match=r"\{z\} cannot be inside chat messages: the completion follows them"
    ):
        PromptTemplate([{"role": "user", "content": "{z}"}])


def test_messages_without_a_chat_template_say_what_to_do(one_lm: LanguageModel) -> None:
    prompt = PromptTemplate([{"role": "user", "content": "{x}"}])
    with pytest.raises(ConfigError, match=r"give the prompt as one string, or set tokenizer\.chat_template"):
        one_lm.encode_prompt(prompt, {"x": "a"})


LATENT_ERRORS: dict[str, Callable[[LanguageModel], object]] = {
    "nowhere": lambda lm: lm.log_prob("{y}", given="{x}"),
    "in both": lambda lm: lm.log_prob("{z}{y}", given="{x}{z}"),
    "beside messages": lambda lm: lm.log_prob("{y}", given=[{"role": "user", "content": "{x}"}]),
}


@pytest.mark.parametrize("where", LATENT_ERRORS)
def test_the_latent_must_appear_once(one_lm: LanguageModel, where: str) -> None:
    with pytest.raises(TemplateError, match=r"\{z\} must appear exactly once, in `of` or in a text `given`"):
        LATENT_ERRORS[where](one_lm)


def test_the_latent_repeated_in_one_template(one_lm: LanguageModel) -> None:
    with pytest.raises(TemplateError, match=r"\{z\} may appear only once"):
        one_lm.log_prob("{z}, {z}")


def test_a_policy_prompt_ends_where_the_completion_begins(one_lm: LanguageModel) -> None:
    with pytest.raises(TemplateError, match=r"take \{z\} out"):
        tiny_policy(one_lm, "{x}{z} and then", Support(stop="."))


def test_long_prompts_say_what_to_do(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", max_tokens=10))
    fits = CONTEXT - 10 - 1
    remedy = f"has a context of {CONTEXT}; shorten the prompt, lower max_tokens, or drop such rows"
    assert len(policy.encode_rows([{"x": "b" * (fits - 1)}])[0]) == fits
    with pytest.raises(PromptTooLongError, match=f"needs {CONTEXT + 1} tokens.*{remedy}"):
        policy.encode_rows([{"x": "a"}, {"x": "b" * fits}])
    with pytest.raises(PromptTooLongError, match=remedy):
        policy.sample([{"x": "b" * 80}])


def test_long_targets_say_what_to_do(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "a", Support(stop=".", max_tokens=10))
    rollouts = policy.rollouts([{"y": "b" * (CONTEXT - 3)}], [[[5, 6]]])
    target = one_lm.log_prob("{z}{y}")
    with pytest.raises(PromptTooLongError, match=r"\{z\}\{y\}.*shorten the prompt"):
        target.score(rollouts)
    target.score(policy.rollouts([{"y": "b" * (CONTEXT - 4)}], [[[5, 6]]]))


def test_nearest() -> None:
    assert nearest("subtbb", ["subtb", "tb"]) == "did you mean 'subtb'? Valid: subtb, tb."
    assert nearest("qqq", ["subtb", "tb"]) == "Valid: subtb, tb."


def test_a_text_starts_with_one_start_token(models: dict[str, LanguageModel]) -> None:
    llama, gpt2 = models["llama-tied"], models["gpt2-tied"]
    assert llama.encode_start("a") == [0, *gpt2.encode_start("a")]
    assert llama.encode_start("<s>a") == llama.encode_start("a")
    assert llama.encode_start("") == gpt2.encode_start("") == [0]


def test_an_empty_prompt_needs_a_start_token(models: dict[str, LanguageModel]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    lm = LanguageModel(models["gpt2-tied"].model, tokenizer)
    assert lm.encode_start("ab") == lm.encode_continuation("ab")
    with pytest.raises(ConfigError, match=r"set tokenizer\.bos_token, or write a prompt"):
        lm.encode_start("")


def test_unknown_models_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Give a hub name, a local folder with config\.json.*'embedded'"):
        LanguageModel.from_pretrained(tmp_path / "nothing here")


def test_every_error_is_an_amortlm_error() -> None:
    for error in (ConfigError, DataError, PromptTooLongError, TemplateError):
        assert issubclass(error, AmortLMError)
