"""Requests drawn together get what each gets alone; texts in pieces are never taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import tiny_policy

from amortlm import LanguageModel, Posterior, Support, verifier
from amortlm.errors import AmortLMError, ModelError, PromptTooLongError, RewardError
from amortlm.posterior import Ask
from amortlm.serve.drawing import Pieces, PlainDraw, draw_together

ASKS = [
    Ask({"x": "the dog"}, 3, 1),
    Ask({"x": "a"}, 1, 1),
    Ask({"x": "the dog"}, 4, 2),
    Ask({"x": "a cat ran, the dog"}, 2, 1),
    Ask({"x": "the dog"}, 300, 1),  # more than one seed
]


def drawn(posterior: Posterior, asks: list[Ask], **settings: Any) -> list[PlainDraw]:
    works = [PlainDraw(ask, **settings) for ask in asks]
    draw_together(posterior, works)
    return works


def assert_same(found: Any, alone: Any) -> None:
    """Tokens and texts exactly; figures up to the rounding of passes of other shapes."""
    assert [(s.tokens, s.text) for s in found] == [(s.tokens, s.text) for s in alone]
    for name in ("log_q", "log_reward", "weight"):
        values = [getattr(s, name) for s in found]
        assert values == pytest.approx([getattr(s, name) for s in alone], abs=1e-4)
    assert (found.draws, found.method) == (alone.draws, alone.method)
    assert (found.ess, found.log_z) == pytest.approx((alone.ess, alone.log_z), rel=1e-3)


def test_together_as_alone(posterior: Posterior) -> None:
    for ask, work in zip(ASKS, drawn(posterior, ASKS), strict=True):
        found = work.future.result(0)
        assert_same(found.samples, posterior.sample(ask.row, ask.n, seed=ask.seed))
        assert found.prompt_tokens == len(posterior.policy.encode_rows([ask.row])[0])


def test_another_seed_or_row_gives_others(posterior: Posterior) -> None:
    """Control: the comparison can fail."""
    for other in (Ask(ASKS[0].row, 3, 5), Ask({"x": "a dog"}, 3, 1)):
        with pytest.raises(AssertionError):
            assert_same(posterior.sample_each([other])[0], posterior.sample(ASKS[0].row, 3, seed=1))


def test_a_bad_row_fails_alone(posterior: Posterior) -> None:
    bad = [Ask({"x": "the dog " * 40}), Ask({"x": None}), Ask({})]
    works = drawn(posterior, [bad[0], ASKS[0], bad[1], ASKS[2], bad[2]])
    for i in (0, 2, 4):
        assert isinstance(works[i].future.exception(0), AmortLMError)
    assert isinstance(works[0].future.exception(0), PromptTooLongError)
    for i, ask in ((1, ASKS[0]), (3, ASKS[2])):
        assert_same(works[i].future.result(0).samples, posterior.sample(ask.row, ask.n, seed=ask.seed))


def test_a_target_that_fails_for_one_row_fails_no_other(posterior: Posterior, one_lm: LanguageModel) -> None:
    def touchy(texts: list[str], rows: list[Any]) -> list[float]:
        if any(row["x"] == "a" for row in rows):
            raise ValueError("a")
        return [0.0] * len(texts)

    picky = Posterior(posterior.policy, one_lm.log_prob("{z}") + verifier(touchy))
    heard: list[tuple[int, str]] = []
    works = [PlainDraw(ask) for ask in ASKS[:3]]
    works[0].tell = lambda i, text: heard.append((i, text))
    draw_together(picky, works)
    assert isinstance(works[1].future.exception(0), RewardError)
    for i in (0, 2):
        alone = picky.sample(ASKS[i].row, ASKS[i].n, seed=ASKS[i].seed)
        assert_same(works[i].future.result(0).samples, alone)
    # Drawn twice, told once.
    told = ["".join(text for j, text in heard if j == i) for i in range(3)]
    assert told == [s.text for s in works[0].future.result(0).samples]


def test_a_pass_ends_when_all_have_gone(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [PlainDraw(ask) for ask in ASKS[:2]]
    steps = []
    real = type(posterior.policy.support).step

    def step(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            works[0].gone = True
        if len(steps) == 3:
            works[1].gone = True
        return real(*args)

    monkeypatch.setattr(type(posterior.policy.support), "step", step)
    draw_together(posterior, works)
    assert len(steps) == 3
    assert all(work.future.result(0) is None for work in works)


class TestPieces:
    """Characters of two to four bytes, each byte a token."""

    TEXT = "é — 日本 🙂🙂 a\n.é"

    def push_all(self, lm: LanguageModel, tokens: list[int], text: str) -> list[str]:
        pieces, seen = Pieces(lm, set()), []
        for token in tokens:
            pieces.push(token, -1.0)
            seen.append(pieces.text)
            assert text.startswith(pieces.text)
        pieces.finish(text, len(tokens))
        assert pieces.text == "".join(pieces.texts) == text
        return seen

    def test_of_tokens_that_are_bytes(self, embedded: LanguageModel) -> None:
        tokens = embedded.encode_continuation(self.TEXT)
        assert len(tokens) > len(self.TEXT)  # there are characters of several tokens
        seen = self.push_all(embedded, tokens, embedded.decode(tokens))
        assert "\ufffd" not in "".join(seen)
        assert len(set(seen)) > 8  # and it does not wait for the end

    def test_of_half_a_character_at_the_end_and_inside(self, embedded: LanguageModel) -> None:
        tokens = embedded.encode_continuation(self.TEXT)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            order = torch.randperm(len(tokens), generator=generator)[:9].tolist()
            some = [tokens[i] for i in order]
            self.push_all(embedded, some, embedded.decode(some))

    def test_of_byte_fallback(self, byte_fallback_lm: LanguageModel) -> None:
        lm = byte_fallback_lm
        whole = [lm.tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "é🙂".encode()]
        a = lm.encode_continuation("a")
        for tokens in (
            [*a, *whole, *a],
            [*a, *whole],
            [*a, *whole[:3], *a],
            whole[:3],
            [*whole[:2], *a, *whole[2:]],
        ):
            self.push_all(lm, tokens, lm.decode(tokens))

    def test_a_text_that_changes_is_not_sent(self, one_lm: LanguageModel) -> None:
        pieces = Pieces(one_lm, set())
        pieces.push(one_lm.token_id("a"), -1.0)
        with pytest.raises(ModelError, match="leave stream and logprobs out"):
            pieces.finish("b", 1)

    def test_of_a_special_stop_symbol(self, one_lm: LanguageModel) -> None:
        posterior = Posterior(
            tiny_policy(
                one_lm, "{x}", Support(stop="</s>", max_tokens=6, allowed_tokens=(" a", " cat", "s"))
            ),
            None,
        )
        (work,) = drawn(posterior, [Ask({"x": "a"}, 30, 1)], wants_pieces=True)
        found = work.future.result(0)
        for pieces, sample in zip(found.pieces, found.samples, strict=True):
            assert "".join(pieces.texts) == sample.text
            assert "</s>" not in sample.text
            assert len(pieces.texts) == len(pieces.log_q) == len(sample.tokens) + 1
            assert sum(pieces.log_q) == pytest.approx(sample.log_q, abs=1e-4)
        assert len({len(sample.tokens) for sample in found.samples}) > 2
