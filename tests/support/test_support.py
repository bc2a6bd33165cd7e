"""Supports, the completions in them, and rollouts: shapes, masks and the errors that name the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import random_rollouts, tiny_lm, tiny_policy, tiny_tokenizer
from tokenizers import AddedToken

from amortlm.errors import ConfigError, DataError, SupportError
from amortlm.language_model import LanguageModel
from amortlm.policy.laws import check_policy
from amortlm.support import Support
from amortlm.types import Rollouts, row_key

ROWS = [{"x": "the dog"}, {"x": "a"}]


def test_what_may_be_written(one_lm: LanguageModel) -> None:
    everything = Support(stop=".").bind(one_lm)
    banned = {one_lm.token_id(t) for t in (".", "<s>", "</s>")}
    assert set((~everything.allowed).nonzero().squeeze(1).tolist()) == banned
    some = Support(stop=(".", "!"), allowed_tokens=("a", ".", " cat", 9), banned_tokens=(" cat",)).bind(
        one_lm
    )
    assert some.allowed.nonzero().squeeze(1).tolist() == sorted([one_lm.token_id("a"), 9])
    assert some.stop_ids == (one_lm.token_id("."), one_lm.token_id("!"))
    assert Support(stop=("!", "!")).bind(one_lm).stop_ids == (one_lm.token_id("!"),)


def test_a_special_token_can_be_the_stop(one_lm: LanguageModel) -> None:
    assert Support(stop="</s>").bind(one_lm).stop_ids == (one_lm.tokenizer.eos_token_id,)


def lm_with(tokens: list[AddedToken], unused_rows: int) -> LanguageModel:
    """A model whose tokenizer has these tokens, with that many rows for them in its embeddings."""
    lm = tiny_lm("gpt2", tiny_tokenizer(), tied=True, unused_rows=unused_rows)
    lm.tokenizer.add_tokens(tokens)
    return LanguageModel(lm.model, lm.tokenizer, name="longer")


def test_special_tokens_of_no_role_are_written_only_by_name() -> None:
    lm = lm_with([AddedToken("<sep>", special=True), AddedToken("<word>", special=False)], unused_rows=2)
    sep, word = lm.token_id("<sep>"), lm.token_id("<word>")
    assert sep not in lm.tokenizer.all_special_ids
    assert not Support(stop=".").bind(lm).allowed[sep]
    assert Support(stop=".").bind(lm).allowed[word]
    assert Support(stop="<sep>").bind(lm).stop_ids == (sep,)
    named = Support(stop=".", allowed_tokens=["a", "<sep>"], max_tokens=3)
    policy = tiny_policy(lm, "{x}", named)
    rollouts, _ = policy.sample(ROWS, 40)
    for z in rollouts.completions():
        assert lm.decode(z).count("<sep>") == z.count(sep), "constraints and verifiers see it"
    assert rollouts.tokens.eq(sep).any()


def test_every_token_of_a_default_support_shows_in_the_text(
    embedded: LanguageModel, metaspace_lm: LanguageModel
) -> None:
    for lm in (embedded, metaspace_lm):
        for token in Support(stop=".").bind(lm).allowed.nonzero().squeeze(1).tolist():
            assert lm.decode([token]), lm.tokenizer.convert_ids_to_tokens(token)


def test_tokens_that_the_model_does_not_have_are_one_error() -> None:
    lm = lm_with([AddedToken("<new>")], unused_rows=0)
    message = (
        r"token '<new>' \(id 48\) that the model, with 48 embeddings, does not know; call model\.resize_token"
    )
    with pytest.raises(ConfigError, match=message):
        Support(stop="<new>").bind(lm)
    with pytest.raises(ConfigError, match=message):
        Support(stop=".", allowed_tokens=["<new>"]).bind(lm)
    policy = tiny_policy(lm, "{x}", Support(stop="."))
    for use in (
        lambda: policy.sample([{"x": "a<new>"}]),
        lambda: policy.rollouts([{"x": "a"}], [["a<new>"]]),
        lambda: lm.log_prob("{z}<new>").context({}),
    ):
        with pytest.raises(ConfigError, match=message):
            use()
    assert policy.sample([{"x": "a"}])[0].lengths.tolist(), "what it does not need does no harm"


def test_rows_of_the_output_layer_without_a_token_are_never_written() -> None:
    tokenizer = tiny_tokenizer()
    lm = tiny_lm("gpt2", tokenizer, tied=True, unused_rows=16)
    support = Support(stop=".", min_tokens=0, max_tokens=1)
    assert lm.vocab_size == len(support.bind(lm).allowed) == len(tokenizer) + 16
    policy = tiny_policy(lm, "{x}", support)
    check_policy(policy, ROWS)
    rollouts, _ = policy.sample(ROWS, 200)
    assert rollouts.tokens.max() < len(tokenizer)


def test_size_and_membership(one_lm: LanguageModel) -> None:
    bound = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=("a", "b")).bind(one_lm)
    a, b, stop = (one_lm.token_id(t) for t in ("a", "b", "."))
    assert bound.size() == 2 + 4 + 8
    for tokens in ([a], [a, b, a]):
        assert bound.contains(tokens)
    for tokens in ([], [a] * 4, [stop], [a, 7], [a, 10_000], [-1]):
        assert not bound.contains(tokens)
    empty = Support(stop=".", min_tokens=0, max_tokens=1, allowed_tokens=()).bind(one_lm)
    assert empty.size() == 1
    assert empty.contains([])


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (
            Support(stop=" the cat"),
            r"' the cat' is 2 tokens.*\['Ġthe', 'Ġcat'\].*use one of these, a token id",
        ),
        (Support(stop=""), "0 tokens"),
        (Support(stop=()), "no stop token; name at least one"),
        (Support(stop=48), r"token id 48 is outside the vocabulary \(0\.\.47\)"),
        (Support(stop=-1), "outside the vocabulary"),
        (Support(stop=".", allowed_tokens=["xyz"]), "'xyz' is 3 tokens"),
        (
            Support(stop=".", allowed_tokens=["a"], banned_tokens=["a"]),
            "allows nothing.*widen allowed_tokens",
        ),
        (Support(stop=".", allowed_tokens=["."]), "allows nothing"),
    ],
)
def test_supports_that_cannot_be_are_refused(one_lm: LanguageModel, support: Support, message: str) -> None:
    with pytest.raises(SupportError, match=message):
        support.bind(one_lm)


@pytest.mark.parametrize(("low", "high"), [(3, 2), (-1, 2), (0, 0)])
def test_lengths_that_allow_nothing_are_refused(low: int, high: int) -> None:
    with pytest.raises(SupportError, match="need 0 <= min_tokens <= max_tokens and max_tokens >= 1"):
        Support(stop=".", min_tokens=low, max_tokens=high)


def test_a_support_survives_json() -> None:
    support = Support(stop=(".", 4), min_tokens=2, allowed_tokens=("a", 3))
    again = Support(**support.to_dict())
    assert again.to_dict() == support.to_dict()
    assert again.to_dict()["stop"] == [".", 4]


def test_completions_from_texts_and_tokens(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=(".", "!"), min_tokens=1, max_tokens=3))
    cat, ran, bang = (one_lm.token_id(t) for t in (" cat", " ran", "!"))
    rollouts = policy.rollouts(ROWS, [[" cat ran!", [cat]], [" cat ran."]])
    assert rollouts.completions() == [[cat, ran], [cat], [cat, ran]]
    assert rollouts.stops.tolist() == [bang, policy.support.stop_ids[0], policy.support.stop_ids[0]]
    assert rollouts.row_index.tolist() == [0, 0, 1]
    assert rollouts.stop_mask.tolist() == [[False, True, True], [False, True, False], [False, True, True]]
    assert rollouts.action_mask.tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize("completion", [" cat a cat a", "", ".", "a?", [5, 10_000], [-1]])
def test_completions_outside_the_support_are_refused(one_lm: LanguageModel, completion: object) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", max_tokens=3, banned_tokens=("?",)))
    with pytest.raises(
        DataError, match=r"outside the support: . tokens where 1 to 3 are allowed, or a banned"
    ):
        policy.rollouts(ROWS[:1], [[completion]])  # type: ignore[list-item]


# Rollouts


def test_select_keeps_the_trajectories(one_lm: LanguageModel) -> None:
    rollouts = random_rollouts(one_lm, Support(stop=".", min_tokens=0, max_tokens=4), ROWS, per_row=5)
    short = (rollouts.lengths <= 2).nonzero().squeeze(1).flip(0)
    part = rollouts.select(short)
    assert part.completions() == [rollouts.completions()[i] for i in short]
    assert part.tokens.shape[1] == 2
    assert part.stop_mask.shape == (len(short), 3)
    rows = [part.rows[i] for i in part.row_index]
    assert rows == [rollouts.rows[i] for i in rollouts.row_index[short]]
    only = rollouts.select((rollouts.row_index == 1).nonzero().squeeze(1))
    assert only.rows == ROWS[1:]
    assert set(only.row_index.tolist()) == {0}


def test_cat_brings_the_trajectories_of_a_row_together(one_lm: LanguageModel) -> None:
    short = random_rollouts(one_lm, Support(stop=".", max_tokens=2), ROWS, seed=1)
    long = random_rollouts(one_lm, Support(stop=".", max_tokens=5), ROWS, seed=2)
    both = Rollouts.cat([short, long])
    assert both.row_index.tolist() == sorted(both.row_index.tolist())
    assert both.tokens.shape == (12, 5)
    assert both.stop_mask.shape == (12, 6)

    def named(r: Rollouts) -> list[tuple]:
        masks = zip(r.stop_mask.sum(1).tolist(), r.action_mask.sum(1).tolist(), strict=True)
        return sorted(zip(r.row_index.tolist(), r.completions(), r.stops.tolist(), masks, strict=True))

    assert named(both) == sorted(named(short) + named(long))


def test_distinct_trajectories_and_where_they_came_from(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", min_tokens=1, max_tokens=4))
    a, b = ([one_lm.token_id(t) for t in text] for text in ((" dog", " ran"), (" dog", " ran", "s")))
    rollouts = policy.rollouts([{"x": "the"}, {"x": "a"}], [[b, a, b], [a, a]])
    mask = rollouts.stop_mask.clone()
    mask[0, 2], mask[2, 3] = False, False
    rollouts = replace(rollouts, stop_mask=mask)
    distinct, place = rollouts.distinct()
    assert len(distinct) == 3
    assert [distinct.completions()[i] for i in place.tolist()] == rollouts.completions()
    assert torch.equal(distinct.row_index[place], rollouts.row_index)
    assert torch.equal(distinct.stop_mask[place[0]], mask[0] | mask[2]), "what any copy may stop at"
    log_q = policy.evaluate(rollouts)
    picked = policy.evaluate(distinct).select(place)
    torch.testing.assert_close(picked.log_pf, log_q.log_pf)
    torch.testing.assert_close(picked.log_pterm[mask], log_q.log_pterm[mask])


def test_final_only_keeps_the_last_state(one_lm: LanguageModel) -> None:
    rollouts = random_rollouts(one_lm, Support(stop=".", min_tokens=0, max_tokens=4), ROWS, per_row=5)
    mask = rollouts.final_only().stop_mask
    assert (mask.sum(1) == 1).all()
    torch.testing.assert_close(mask.int().argmax(1), rollouts.lengths)
    assert rollouts.stop_mask.sum() > len(rollouts), "the original is unchanged"


def test_padding_is_not_written(one_lm: LanguageModel) -> None:
    rollouts = random_rollouts(one_lm, Support(stop=".", min_tokens=0, max_tokens=4), ROWS, per_row=5)
    assert (rollouts.action_mask.sum(1) == rollouts.lengths).all()


def test_row_keys_do_not_depend_on_order_process_or_version() -> None:
    assert row_key({"x": "a", "y": 1}) == row_key({"y": 1, "x": "a"})
    assert row_key({"x": "a"}) != row_key({"x": "b"})
    assert row_key({"x": "a"}) == "c8a26cb0e9fddb5d"
