"""Laws 1, 2 and 4 with a tool in the support: what it writes is certain, for the policy and for the target."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from reference import plain_ids, sequence_log_prob, tiny_policy
from stats import LEVEL, g_test

from amortlm.errors import ConfigError, DataError, SupportError
from amortlm.language_model import LanguageModel
from amortlm.policy.laws import check_policy, support_completions
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.support.tools import Calculator, Lookup, Tool
from amortlm.targets.laws import check_target

ROWS = [{"x": "the cat", "y": " a dog"}, {"x": "a", "y": " cat"}]
# " cat:" is followed by " dog ran", which is not among the allowed tokens.
LOOKUP = Lookup({"cat": "dog ran"}, trigger=":")
WITH_TOOL = Support(stop=".", min_tokens=1, max_tokens=4, allowed_tokens=(" a", " cat", ":"), tool=LOOKUP)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" 6 - 0 =", " 6"),
        (" 2 - 8 =", " -6"),
        (" -4 - 3 =", " -7"),
        (" 8 - 5 - 9 =", " -4"),  # the last two operands only
        (" 12 * 3=", " 36"),
        (" 8 / 2 =", " 4"),
        (" 9 / 2 =", ""),
        (" 1 / 0 =", ""),
        (" the answer =", ""),
        (" __import__('os') =", ""),
    ],
)
def test_calculator(text: str, written: str) -> None:
    assert Calculator().write(text) == written


def test_lookup_takes_the_longest_key_that_is_a_whole_word() -> None:
    tool = Lookup({"York": "a city", "New York": "a large city"})
    assert tool.write("of New York:") == " a large city"
    assert tool.write("of Yorks:") == ""
    assert tool.write("of NewYork:") == ""


def test_policy_is_a_distribution(family_lm: LanguageModel) -> None:
    policy = tiny_policy(family_lm, "{x}", WITH_TOOL)
    check_policy(policy, ROWS, num_samples=40)
    texts = {family_lm.decode(z) for z in support_completions(policy)}
    assert " cat: dog ran" in texts
    assert " cat:" not in texts, "it stopped before the tool wrote"
    assert not any("cat: cat" in t or "cat: a" in t for t in texts)


def test_what_a_tool_wrote_is_no_action(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", WITH_TOOL)
    rollouts = policy.rollouts(ROWS[:1], [[" cat: dog ran", " a"]])
    assert rollouts.action_mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert rollouts.stop_mask[0].tolist() == [False, True, False, False, True]
    log_probs = policy.evaluate(rollouts)
    assert log_probs.log_pf[0, 2:].abs().max() == 0
    # Control: as actions the same tokens cost many nats.
    free = replace(rollouts, action_mask=rollouts.tokens > 0)
    assert policy.evaluate(free).log_pf[0, 2:].sum() < -1


def test_log_q_of_samples_counts_no_forced_token(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", WITH_TOOL)
    rollouts, sampled = policy.sample(ROWS, 200, seed=2)
    written = torch.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    assert (written & ~rollouts.action_mask).any()
    evaluated = policy.evaluate(rollouts).final(rollouts.lengths)
    torch.testing.assert_close(sampled.final(rollouts.lengths), evaluated, atol=1e-4, rtol=0)


def test_samples_follow_q(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", WITH_TOOL)
    completions = support_completions(policy)
    rollouts = policy.rollouts(ROWS[:1], [completions])
    q = policy.evaluate(rollouts).final(rollouts.lengths).double().exp()
    drawn, _ = policy.sample(ROWS[:1], 16_000, seed=5)
    counts = Counter(map(tuple, drawn.completions()))
    observed = torch.tensor([counts[tuple(z)] for z in completions])
    assert observed.sum() == 16_000
    assert g_test(observed, q) > LEVEL
    # Control: q of the same completions with the tool's tokens counted as choices is another distribution.
    biased = policy.evaluate(replace(rollouts, action_mask=rollouts.tokens > 0)).final(rollouts.lengths)
    assert g_test(observed, biased.double().exp()) < LEVEL


def test_target_obeys_its_laws_and_equals_a_plain_pass(family_lm: LanguageModel) -> None:
    policy = tiny_policy(family_lm, "{x}", WITH_TOOL)
    target = family_lm.log_prob("{z}{y}", given="{x}")
    check_target(target, policy.sample(ROWS, 12)[0])
    rollouts = policy.rollouts(ROWS[:1], [[" cat: dog ran"]])
    prompt, z = family_lm.encode_start("the cat"), plain_ids(family_lm, " cat: dog ran")
    whole = [*prompt, *z, *plain_ids(family_lm, "."), *plain_ids(family_lm, " a dog")]
    end = len(prompt) + len(z)
    by_hand = sequence_log_prob(family_lm.model, whole[: len(prompt) + 2], len(prompt))
    by_hand += sequence_log_prob(family_lm.model, whole, end)
    assert target.score_final(rollouts).item() == pytest.approx(by_hand, abs=1e-3)


def test_completions_that_the_tool_would_not_write_are_outside(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", WITH_TOOL)
    for text in (" cat: cat", " cat:", " cat: dog"):
        with pytest.raises(DataError, match="outside the support"):
            policy.rollouts(ROWS[:1], [[text]])


def test_max_tokens_cuts_what_a_tool_writes(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", replace(WITH_TOOL, max_tokens=3))
    assert " cat: dog" in {one_lm.decode(z) for z in support_completions(policy)}
    check_policy(policy, ROWS, num_samples=20)


def test_embedded_model_calculates(embedded: LanguageModel) -> None:
    support = Support(stop=".", min_tokens=1, max_tokens=30, tool="calculator")
    policy = tiny_policy(embedded, "Question: {x} = ? Answer:", support)
    rollouts, _ = policy.sample([{"x": "9 + 4 - 8"}], 64, seed=1)
    check_policy(policy, [{"x": "9 + 4 - 8"}])
    forced = ~rollouts.action_mask & (torch.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None])
    called = [t for t in Posterior(policy, None).texts(rollouts) if " = " in t]
    assert called
    assert forced.any()


def test_saved_and_loaded(one_lm: LanguageModel) -> None:
    spec = WITH_TOOL.to_dict()
    assert spec["tool"] == {"lookup": {"table": {"cat": "dog ran"}, "trigger": ":"}}
    assert Support(**spec).bind(one_lm).tool.tool == LOOKUP
    assert Support(stop=".", tool="calculator").to_dict()["tool"] == {"calculator": {}}


def test_errors_name_the_remedy(one_lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="did you mean 'calculator'"):
        Support(stop=".", tool="calculater").bind(one_lm)
    with pytest.raises(ConfigError, match="tool lookup"):
        Support(stop=".", tool={"lookup": {"tabel": {}}}).bind(one_lm)

    class Own(Tool):
        trigger = ":"

        def write(self, text: str) -> str:
            return "."

    with pytest.raises(ConfigError, match="cannot be saved by name"):
        Support(stop=".", tool=Own()).to_dict()
    policy = tiny_policy(one_lm, "{x}", replace(WITH_TOOL, tool=Own()))
    with pytest.raises(SupportError, match="stop symbol"):
        policy.sample(ROWS, 64)
