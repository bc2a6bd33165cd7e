"""Verifiers, predicates and `matches`: what they return, raise, change or never finish."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import random_rollouts

from amortlm import LanguageModel, Policy, Posterior, Support, constraint, verifier
from amortlm.errors import ConfigError, RewardError

SUPPORT = Support(stop=".", min_tokens=0, max_tokens=3)
ROWS = [{"x": "the dog", "tags": ["a"]}, {"x": "a", "tags": []}]


@pytest.fixture
def score(one_lm: LanguageModel) -> Callable[[Any], torch.Tensor]:
    rollouts = random_rollouts(one_lm, SUPPORT, ROWS, per_row=4)
    return lambda term: (one_lm.log_prob("{z}") * 0.5 + term).score(rollouts.final_only())


RIGHT: dict[str, Callable[[int], Any]] = {
    "list": lambda n: [float(i) for i in range(n)],
    "tuple of integers": lambda n: tuple(range(n)),
    "generator": lambda n: (i for i in range(n)),
    "numpy": lambda n: np.arange(n),
    "numpy float32": lambda n: np.arange(n, dtype=np.float32),
    "torch": lambda n: torch.arange(n),
    "torch with gradient": lambda n: torch.arange(n, dtype=torch.float32).requires_grad_(),
    "bfloat16": lambda n: torch.arange(n).bfloat16(),
    "list of tensors": lambda n: [torch.tensor(float(i)) for i in range(n)],
}


@pytest.mark.parametrize("kind", RIGHT)
def test_scores_in_any_flat_form(score: Callable[[Any], torch.Tensor], kind: str) -> None:
    expected = score(verifier(lambda texts, rows: RIGHT["list"](len(texts))))
    torch.testing.assert_close(score(verifier(lambda texts, rows: RIGHT[kind](len(texts)))), expected)
    assert expected.unique().numel() > 4


WRONG: dict[str, tuple[Callable[[int], Any], str]] = {
    "nothing": (lambda n: None, "returned None"),
    "a number": (lambda n: 0.0, "returned 0.0"),
    "n x 1": (lambda n: np.zeros((n, 1)), "flat array"),
    "n x 1 of torch": (lambda n: torch.zeros(n, 1), "flat array"),
    "too few": (lambda n: [0.0] * (n - 1), "7 scores for 8 texts"),
    "text": (lambda n: ["1"] * n, "in a list or a flat array"),
    "one text": (lambda n: "11111111", "in a list or a flat array"),
    "truth values": (lambda n: [True] * n, "constraint.predicate takes a function"),
    "None among numbers": (lambda n: [None, *[0.0] * (n - 1)], "in a list or a flat array"),
    "ragged": (lambda n: [[0.0], *[[0.0, 1.0]] * (n - 1)], "in a list or a flat array"),
    "complex": (lambda n: [1j] * n, "in a list or a flat array"),
    "NaN": (lambda n: [math.nan] * n, "gave NaN or +inf for"),
    "infinite": (lambda n: [math.inf] * n, "gave NaN or +inf for"),
    "beyond float32": (lambda n: [-1e300] * n, "gave NaN or +inf for"),
    "an error": (lambda n: 1 / 0, "raised ZeroDivisionError"),
    "the end": (lambda n: exit(3), "raised SystemExit: 3"),
}


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_score_names_the_verifier(
    score: Callable[[Any], torch.Tensor], kind: str, timeout: float | None
) -> None:
    make, message = WRONG[kind]

    def judge(texts: list[str], rows: list[Any]) -> Any:
        return make(len(texts))

    with pytest.raises(RewardError) as e:
        score(verifier(judge, timeout=timeout))
    assert message in str(e.value)
    assert "judge) " in str(e.value) or "judge)," in str(e.value)
    if kind == "an error":
        assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_minus_infinity_is_impossible(score: Callable[[Any], torch.Tensor]) -> None:
    found = score(verifier(lambda texts, rows: [-math.inf] + [0.0] * (len(texts) - 1)))
    assert torch.isneginf(found).sum() == 1


PREDICATES: dict[str, tuple[Callable[[str], Any], str]] = {
    "nothing": (lambda text: None, "returned None"),
    "a number": (lambda text: 1.5, "returned 1.5"),
    "text": (lambda text: "no", "returned 'no'"),
    "several": (lambda text: np.array([True, False]), "return True or False"),
    "an error": (lambda text: text[99], "raised IndexError"),
}


@pytest.mark.parametrize("kind", PREDICATES)
def test_a_predicate_is_true_or_false(score: Callable[[Any], torch.Tensor], kind: str) -> None:
    fn, message = PREDICATES[kind]
    with pytest.raises(RewardError, match=r"predicate\(.*called with") as e:
        score(constraint.predicate(fn))
    assert message in str(e.value)


@pytest.mark.parametrize("kind", [bool, np.bool_, torch.tensor, np.array])
def test_truth_values_of_libraries(score: Callable[[Any], torch.Tensor], kind: Any) -> None:
    expected = score(constraint.predicate(lambda text: len(text) < 3))
    assert expected.isneginf().any()
    assert not expected.isneginf().all()
    assert torch.equal(score(constraint.predicate(lambda text: kind(len(text) < 3))), expected)


def test_what_a_function_is_given_is_its_own(one_lm: LanguageModel) -> None:
    def spoil(texts: list[str], rows: list[Any]) -> list[float]:
        for row in rows:
            row["tags"].append("seen")
            row["x"] = ""
        texts.clear()
        return [0.0] * len(rows)

    def also(text: str, row: Any) -> bool:
        row["tags"].append("seen")
        return len(row.pop("tags")) < 3

    rows = [{"x": "the dog", "tags": ["a"]}]
    target = one_lm.log_prob("{z}", given="{x}") + verifier(spoil) + constraint.predicate(also)
    rollouts = random_rollouts(one_lm, SUPPORT, rows, per_row=4)
    assert torch.isfinite(target.score_final(rollouts)).all()
    assert rows == [{"x": "the dog", "tags": ["a"]}]


@pytest.mark.parametrize("make", [lambda fn: verifier(lambda t, r: fn(), timeout=0.2), lambda fn: constraint.predicate(lambda t: fn(), timeout=0.2)])  # fmt: skip
def test_a_function_that_never_returns_is_left_behind(
    score: Callable[[Any], torch.Tensor], make: Any
) -> None:
    go = threading.Event()
    try:
        with pytest.raises(RewardError, match=r"called with .* did not return within 0.2 seconds"):
            score(make(go.wait))
    finally:
        go.set()


def test_a_time_limit_is_saved(one_lm: LanguageModel) -> None:
    name = "amortlm.lab.tasks.numbers:is_valid"
    assert constraint.predicate(name, timeout=3).to_spec() == [
        {"predicate": {"function": "numbers.is_valid", "timeout": 3}}
    ]
    assert verifier(name, timeout=3).to_spec()[0]["verifier"]["timeout"] == 3
    for wrong in (0, -1, math.nan, "3"):
        with pytest.raises(ConfigError, match="positive number of seconds"):
            verifier(name, timeout=wrong)


def decorated(fn: Any) -> Any:
    import functools

    return functools.wraps(fn)(lambda text: not fn(text))


def plain(text: str) -> bool:
    return True


opposite = decorated(plain)  # says that it is `plain`


@pytest.mark.parametrize("fn", [str.islower, math.isfinite, lambda text: True, opposite, plain.__call__])
def test_what_its_name_does_not_find_again_is_not_saved_by_name(fn: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be saved by name"):
        constraint.predicate(fn).to_spec()


def test_matches_gives_up() -> None:
    hard = r"(a|b| |.)*\d|(.|.)*!"
    assert not constraint.matches(hard).accepts("ab " * 60 + "!?", {})  # type: ignore[attr-defined]
    term = constraint.matches(hard + r"\b\d")  # not regular: by an engine that backtracks
    with pytest.raises(ConfigError, match="did not finish with .* Leave out repetitions of repetitions"):
        term.accepts("ab " * 60 + "!?", {})


def test_matches_reads_plain_patterns_as_python_does() -> None:
    term = constraint.matches(r"[A-Z][a-z ]+(dog|cat)s?\.?")
    texts = {" A big dog.": True, "A big dog ": True, "a big dog": False, "A big dogs": True, "A dog!": False}
    assert {text: term.accepts(text, {}) for text in texts} == texts


# What a posterior is saved with


def test_a_model_without_a_name_is_asked_for(one_lm: LanguageModel, tmp_path: Any) -> None:
    nameless = LanguageModel(one_lm.model, one_lm.tokenizer)
    nameless.name = ""
    posterior = Posterior(Policy(nameless, "{x}", SUPPORT), None)
    posterior.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="had no name when it was saved; give the model: lm="):
        Posterior.from_pretrained(tmp_path)
    assert Posterior.from_pretrained(tmp_path, lm=one_lm).sample(ROWS[0], 2) == posterior.sample(ROWS[0], 2)


def test_nothing_saved_names_the_home_directory(
    one_lm: LanguageModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "someone"
    model, out = home / "models" / "tiny", home / "runs" / "a"
    one_lm.model.save_pretrained(model)
    one_lm.tokenizer.save_pretrained(model)
    monkeypatch.setenv("HOME", str(home))
    lm = LanguageModel.from_pretrained(model)
    posterior = Posterior(Policy(lm, "{x}", SUPPORT), lm.log_prob("{z}"))
    posterior.save_pretrained(out)
    assert (out / "tokenizer.json").is_file()
    for file in out.iterdir():
        assert b"someone" not in file.read_bytes(), file
    monkeypatch.chdir(tmp_path)
    assert Posterior.from_pretrained(out).sample(ROWS[0], 2) == posterior.sample(ROWS[0], 2)
    out.rename(tmp_path / "moved")
    assert Posterior.from_pretrained(tmp_path / "moved").lm.name == str(model)
    model.rename(home / "gone")
    with pytest.raises(ConfigError, match="give its new place: lm= in from_pretrained, or --model"):
        Posterior.from_pretrained(tmp_path / "moved")
    assert Posterior.from_pretrained(tmp_path / "moved", lm=str(home / "gone")).sample(ROWS[0], 1)


def test_another_tokenizer_is_said(
    one_lm: LanguageModel, metaspace_lm: LanguageModel, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Posterior(Policy(one_lm, "{x}", SUPPORT), None).save_pretrained(tmp_path)
    Posterior.from_pretrained(tmp_path, lm=one_lm)
    assert not caplog.messages
    other = LanguageModel(one_lm.model, metaspace_lm.tokenizer, name="other")
    Posterior.from_pretrained(tmp_path, lm=other)
    assert "the tokenizer of other differs from the one this posterior was saved with" in caplog.text


def test_arguments_of_the_chat_template_are_kept(one_lm: LanguageModel, tmp_path: Any) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    one_lm.model.save_pretrained(model)
    one_lm.tokenizer.save_pretrained(model)
    lm = LanguageModel.from_pretrained(model)
    lm.chat_template_kwargs = {"enable_thinking": False}
    Posterior(Policy(lm, "{x}", SUPPORT), None).save_pretrained(out)
    assert Posterior.from_pretrained(out).lm.chat_template_kwargs == {"enable_thinking": False}
