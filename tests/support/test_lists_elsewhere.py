"""Lists in decoding and prediction."""

from __future__ import annotations

import pytest
from reference import tiny_policy
from stats import LEVEL
from structured_cases import ROW, SUPPORTS, log_q, p_value

from amortlm import LanguageModel, Posterior
from amortlm.lab.baselines.decoding import decode
from amortlm.policy.laws import support_completions


@pytest.mark.parametrize("name", ["any number", "exactly two", "two or three, long"])
def test_decoding_stays_on_lists(one_lm: LanguageModel, name: str) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS[name])
    log_p = log_q(policy, support_completions(policy))
    drawn = decode(policy, [ROW], "temperature", 4000, temperature=1.0)
    assert p_value(policy, drawn, log_p) > LEVEL
    assert p_value(policy, decode(policy, [ROW], "temperature", 4000, temperature=0.6), log_p) < LEVEL
    best = decode(policy, [ROW], "beam", 1, num_beams=64).completions()[0]
    assert best == support_completions(policy)[int(log_p.argmax())]
    for method in ("beam", "diverse_beam"):
        assert all(map(policy.support.contains, decode(policy, [ROW], method, 3).completions()))


def test_two_latents_predict_as_one(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    row, answers = {"x": "the"}, ["a", "the cat"]
    two, one = (
        Posterior(policy, one_lm.log_prob(of, given="{x}")) for of in ("{z1}{z2} so {y}.", "{z} so {y}.")
    )
    assert two.predict(row, answers, 8) == one.predict(row, answers, 8)
    assert two.vote(row, 8) == one.vote(row, 8)
