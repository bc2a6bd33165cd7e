"""Law 1: on an enumerable support q sums to one, and what is sampled follows it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reference import slow_log_q, tiny_policy
from stats import LEVEL, g_test

from amortlm.engine.decoding import Exploration
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.policy.laws import check_policy, check_sum, support_completions
from amortlm.support import Support
from amortlm.types import PolicyLogProbs, Rollouts

ROWS = [{"x": "the cat"}, {"x": "a"}, {"x": "the dog ran, a cat ran"}]
SMALL = (" a", " cat", "s")
SAMPLES = 16_000

SUPPORTS = {
    "one stop": Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=SMALL),
    "two stops": Support(stop=(".", "!"), min_tokens=1, max_tokens=2, allowed_tokens=SMALL),
    "empty completion": Support(stop=".", min_tokens=0, max_tokens=2, allowed_tokens=SMALL),
    "one length": Support(stop=".", min_tokens=2, max_tokens=2, allowed_tokens=SMALL),
    "all tokens": Support(stop=".", min_tokens=1, max_tokens=2),
    "banned": Support(stop=".", min_tokens=0, max_tokens=1, banned_tokens=("a", " the")),
}


def sampled_p_value(policy: Policy, n: int, exploration: Exploration | None = None) -> float:
    """p-value of n samples of the first row against the enumerated q."""
    completions = support_completions(policy)
    rollouts = policy.rollouts(ROWS[:1], [completions])
    with torch.no_grad():
        q = policy.evaluate(rollouts).final(rollouts.lengths).double().exp()
    drawn, _ = policy.sample(ROWS[:1], n, seed=11, exploration=exploration)
    counts = Counter(map(tuple, drawn.completions()))
    assert set(counts) <= set(map(tuple, completions)), "a sample is outside the support"
    return g_test(torch.tensor([counts[tuple(z)] for z in completions]), q)


def assert_log_q_equal(policy: Policy, rollouts: Rollouts, sampled: PolicyLogProbs) -> None:
    evaluated = policy.evaluate(rollouts)
    for mask, a, b in (
        (rollouts.action_mask, evaluated.log_pf, sampled.log_pf),
        (rollouts.stop_mask, evaluated.log_pterm, sampled.log_pterm),
    ):
        torch.testing.assert_close(a[mask], b[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SUPPORTS)
def test_q_sums_to_one(family_lm: LanguageModel, name: str) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORTS[name])
    assert len(support_completions(policy)) == policy.support.size()
    check_sum(policy, ROWS)


def test_q_sums_to_one_on_every_head(lm: LanguageModel) -> None:
    check_policy(tiny_policy(lm, "{x}", SUPPORTS["two stops"]), ROWS)


@pytest.mark.parametrize("name", ["one stop", "two stops", "empty completion"])
def test_samples_follow_q(one_lm: LanguageModel, name: str) -> None:
    assert sampled_p_value(tiny_policy(one_lm, "{x}", SUPPORTS[name]), SAMPLES) > LEVEL


def test_samples_of_a_tempered_policy_do_not_follow_q(one_lm: LanguageModel) -> None:
    """Negative control: the test that passes above has the power to see a temperature of 0.8."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    tempered = Exploration(temperature=torch.full((SAMPLES,), 0.8))
    assert sampled_p_value(policy, SAMPLES, tempered) < LEVEL


def test_samples_with_uniform_choices_do_not_follow_q(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    assert sampled_p_value(policy, SAMPLES, Exploration(epsilon=0.2)) < LEVEL


def test_exploration_changes_what_is_drawn_but_not_log_q(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    hot = Exploration(temperature=torch.full((24,), 3.0), epsilon=0.1)
    rollouts, sampled = policy.sample(ROWS, 8, exploration=hot)
    assert rollouts.completions() != policy.sample(ROWS, 8)[0].completions()
    assert_log_q_equal(policy, rollouts, sampled)


def test_tempered_samples_follow_the_tempered_law(one_lm: LanguageModel) -> None:
    """Exploration at temperature 2 draws each token from softmax(logits / 2) on the support."""
    support = Support(stop=".", min_tokens=0, max_tokens=1, allowed_tokens=SMALL)
    policy = tiny_policy(one_lm, "{x}", support)
    prompt = policy.encode_rows(ROWS[:1])
    logits = policy.model(input_ids=torch.tensor(prompt)).logits[0, -1].detach()
    stop, tokens = policy.support.stop_ids[0], support_completions(policy)
    probs = (logits[[stop, *(z[0] for z in tokens[1:])]] / 2).softmax(0)
    drawn, _ = policy.sample(ROWS[:1], SAMPLES, exploration=Exploration(torch.full((SAMPLES,), 2.0)))
    counts = Counter(map(tuple, drawn.completions()))
    assert g_test(torch.tensor([counts[tuple(z)] for z in tokens]), probs) > LEVEL


def test_each_stop_symbol_is_drawn_as_often_as_the_model_says(one_lm: LanguageModel) -> None:
    anywhere = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    prompt = torch.tensor(anywhere.encode_rows(ROWS[:1]))
    logits = anywhere.model(input_ids=prompt).logits[0, -1].detach()
    likely = logits.topk(3).indices.tolist()
    policy = tiny_policy(one_lm, "{x}", Support(stop=likely, min_tokens=0, max_tokens=1))
    rollouts, _ = policy.sample(ROWS[:1], SAMPLES)
    empty = rollouts.stops[rollouts.lengths == 0]
    counts = torch.stack([(empty == s).sum() for s in likely])
    assert counts.min() > 20
    assert g_test(counts, logits[likely].softmax(0)) > LEVEL
    assert g_test(counts.flip(0), logits[likely].softmax(0)) < LEVEL


def test_log_q_is_the_model_renormalised_on_the_support(family_lm: LanguageModel) -> None:
    for support in SUPPORTS.values():
        policy = tiny_policy(family_lm, "{x}", support)
        rollouts, sampled = policy.sample(ROWS, 2)
        prompts = policy.encode_rows(ROWS)
        for b, z in enumerate(rollouts.completions()):
            log_pf, log_pterm = slow_log_q(policy, prompts[rollouts.row_index[b]], z)
            torch.testing.assert_close(sampled.log_pf[b, : len(z)], torch.tensor(log_pf), atol=1e-4, rtol=0)
            got = sampled.log_pterm[b, : len(z) + 1]
            torch.testing.assert_close(got, torch.tensor(log_pterm), atol=1e-4, rtol=0)


def test_the_law_notices_a_q_that_does_not_sum_to_one(one_lm: LanguageModel) -> None:
    """Negative control: forgetting that stopping is sure at max_tokens loses mass."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    correct = policy.evaluate

    def unsure_of_the_end(rollouts):
        log_probs = correct(rollouts)
        log_probs.log_pterm[:, policy.support.max_tokens] -= 0.1
        return log_probs

    policy.evaluate = unsure_of_the_end  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="q sums to 0"):
        check_policy(policy, ROWS)


def test_the_law_notices_sampling_that_disagrees(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["all tokens"])
    correct = policy.sample

    def shifted(*args, **kwargs):
        rollouts, log_probs = correct(*args, **kwargs)
        log_probs.log_pf[1, 0] += 0.01
        return rollouts, log_probs

    policy.sample = shifted  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"evaluate\(\) and sample\(\) differ: trajectory 1"):
        check_policy(policy, ROWS)
