"""Completions that are lists of statements, against enumeration."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test
from structured_cases import ROW, ROWS, SUPPORTS, log_q, p_value, plain_lists

from amortlm import (
    LanguageModel,
    Posterior,
    Support,
)
from amortlm.engine.decoding import Exploration
from amortlm.errors import DataError, SupportError
from amortlm.policy.laws import check_policy, support_completions


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_support_holds_the_lists_and_nothing_else(one_lm: LanguageModel, name: str) -> None:
    bound, expected = SUPPORTS[name].bind(one_lm), plain_lists(SUPPORTS[name], one_lm)
    found = [z for n in range(bound.max_tokens + 1) for z in bound.completions(n)]
    found = [z for z in found if bound.min_tokens <= len(z) <= bound.max_tokens]
    assert len(found) == len(expected) == bound.size()
    assert set(map(tuple, found)) == set(map(tuple, expected))
    assert all(map(bound.contains, found))
    if name != "all tokens":
        alphabet = [one_lm.token_id(t) for t in (*SUPPORTS[name].allowed_tokens, SUPPORTS[name].separator)]
        strings = [z for n in range(bound.max_tokens + 2) for z in product(alphabet, repeat=n)]
        assert sum(map(bound.contains, strings)) == len(expected)


@pytest.mark.parametrize("name", SUPPORTS)
def test_q_on_lists_obeys_the_laws(family_lm: LanguageModel, name: str) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORTS[name])
    assert policy.support.size() <= 20_000, "the sum is checked"
    check_policy(policy, ROWS)


def test_the_law_notices_a_dead_end(one_lm: LanguageModel) -> None:
    """Negative control: a statement that runs on until the missing one does not fit."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    automaton = policy.support.automaton
    # After three tokens of the first statement a fourth is said to be fine: nothing can follow it.
    automaton.can[4, 1] = True
    automaton.goes[3, 1] = True
    with pytest.raises(AssertionError, match="q sums to 0"):
        check_policy(policy, ROWS)


@pytest.mark.parametrize("name", ["any number", "two or three, long", "no room to spare"])
def test_q_is_the_model_on_what_can_still_become_a_list(one_lm: LanguageModel, name: str) -> None:
    """After a prefix exactly those tokens are possible with which some list goes on: no dead ends, nothing lost."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS[name])
    lists = plain_lists(SUPPORTS[name], one_lm)
    prefixes = {tuple(z[:n]) for z in lists for n in range(len(z) + 1)}
    whole = set(map(tuple, lists))
    (prompt,) = policy.encode_rows([ROW])
    stops = list(policy.support.stop_ids)
    rollouts = policy.rollouts([ROW], [lists])
    with torch.no_grad():
        log_probs = policy.evaluate(rollouts)
    logits = {}
    for z in sorted(prefixes):
        with torch.no_grad():
            logits[z] = policy.model(input_ids=torch.tensor([[*prompt, *z]])).logits[0, -1].double()
    for b, z in enumerate(map(tuple, lists)):
        for t in range(len(z) + 1):
            words = [i for i in range(one_lm.vocab_size) if (*z[:t], i) in prefixes]
            ends = stops if z[:t] in whole else []
            norm = logits[z[:t]][[*words, *ends]].logsumexp(0)
            stop = (logits[z[:t]][ends].logsumexp(0) - norm).item() if ends else -math.inf
            assert log_probs.log_pterm[b, t].item() == pytest.approx(stop, abs=1e-4)
            assert bool(rollouts.stop_mask[b, t]) == bool(ends)
            if t < len(z):
                assert log_probs.log_pf[b, t].item() == pytest.approx(
                    (logits[z[:t]][z[t]] - norm).item(), abs=1e-4
                )


def test_samples_follow_q(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["two or three, long"])
    log_p = log_q(policy, support_completions(policy))
    drawn, _ = policy.sample([ROW], 16_000, seed=11)
    assert p_value(policy, drawn, log_p) > LEVEL
    tempered, _ = policy.sample([ROW], 16_000, seed=11, exploration=Exploration(torch.full((16_000,), 0.8)))
    assert p_value(policy, tempered, log_p) < LEVEL
    uniform, _ = policy.sample([ROW], 16_000, seed=11, exploration=Exploration(epsilon=0.2))
    assert p_value(policy, uniform, log_p) < LEVEL


def test_uniform_choices_are_uniform_over_what_is_legal(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    drawn, _ = policy.sample([ROW], 8_000, exploration=Exploration(epsilon=1.0))
    first = Counter(z[0] for z in drawn.completions())
    assert g_test(torch.tensor(list(first.values())), torch.ones(2)) > LEVEL
    # After "w": a word or the separator; after "w w": the same; after "w w w": the separator.
    cut = Counter(z.index(policy.support.lists.separator) for z in drawn.completions())
    probs = torch.tensor([1 / 3, 2 / 9, 4 / 9])
    assert g_test(torch.tensor([cut[1], cut[2], cut[3]]), probs) > LEVEL
    assert g_test(torch.tensor([cut[3], cut[2], cut[1]]), probs) < LEVEL


def test_the_share_of_uniform_choices_is_that_of_each_completion(one_lm: LanguageModel) -> None:
    """What is legal differs within a batch: it must not matter what the others may write."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["any number"])
    explored = Exploration(epsilon=0.5)
    together, _ = policy.sample(ROWS, 40, seed=5, exploration=explored)
    alone, _ = policy.sample(ROWS[1:], 1, seed=5, exploration=explored)
    assert together.completions()[40] == alone.completions()[0]
    one_by_one = [
        policy.sample(ROWS[:1], [n], seed=5, exploration=explored)[0].completions()[-1] for n in (1, 3, 9)
    ]
    assert [together.completions()[n - 1] for n in (1, 3, 9)] == one_by_one


def test_padding_spoils_neither_log_q_nor_gradients(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["padding is the separator"])
    rollouts = policy.rollouts([ROW], [support_completions(policy)])
    log_probs = policy.evaluate(rollouts)
    assert not torch.isnan(log_probs.log_pf).any()
    assert not torch.isnan(log_probs.log_pterm).any()
    log_probs.final(rollouts.lengths).sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_statements_are_split(one_lm: LanguageModel) -> None:
    bound = SUPPORTS["any number"].bind(one_lm)
    a, cat, comma = (one_lm.token_id(t) for t in (" a", " cat", ","))
    assert bound.statements([a, comma, cat, a]) == [[a], [cat, a]]
    assert bound.statements([a]) == [[a]]
    assert Support(stop=".").bind(one_lm).statements([a, comma]) == [[a, comma]]
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    for sample in Posterior(policy, None).sample(ROW, 5):
        assert sample.text.rstrip(".").split(",") == sample.statements
        assert len(sample.statements) == 2
    plain = tiny_policy(one_lm, "{x}", Support(stop=".", max_tokens=2))
    assert Posterior(plain, None).sample(ROW)[0].statements is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_statements": 2}, "give separator="),
        ({"max_statements": 2}, "give separator="),
        ({"separator": ",", "tool": "calculator"}, "take out separator or tool"),
        ({"separator": ",", "min_statements": 0}, "1 <= min_statements"),
        ({"separator": ",", "min_statements": 3, "max_statements": 2}, "min_statements <= max_statements"),
        ({"separator": ",", "min_statements": 4, "max_tokens": 6}, "max_tokens >= 2 * min_statements - 1"),
        ({"separator": "."}, "separator '.' is also a stop token"),
        ({"separator": ", a"}, "not one"),
        ({"separator": ",", "allowed_tokens": (",",)}, "no token is left"),
    ],
)
def test_impossible_lists_are_refused(one_lm: LanguageModel, settings: dict, message: str) -> None:
    with pytest.raises(SupportError) as e:
        Support(stop=".", **settings).bind(one_lm)
    assert message in str(e.value)


def test_a_completion_that_is_no_list_is_refused(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    policy.rollouts([ROW], [[" a, cat.", " a, cat a"]])
    for text in (" a cat", " a,, cat", ", a", " a,", " a, cat, a"):
        with pytest.raises(DataError, match="not 2 to 2 non-empty statements"):
            policy.rollouts([ROW], [[text]])
