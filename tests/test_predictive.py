"""The posterior predictive against enumeration, and votes against a plain count."""

from __future__ import annotations

import math

import pytest
import torch
from reference import plain_ids, sequence_log_prob, tiny_policy
from stats import LEVEL

from amortlm.engine.decoding import Exploration
from amortlm.errors import ConfigError
from amortlm.inference.exact import policy_log_probs
from amortlm.lab.baselines.decoding import decode
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.policy.laws import support_completions
from amortlm.posterior import Posterior
from amortlm.support import Support

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=(" a", " cat", "s"))
ROWS = [{"x": "the cat"}, {"x": "a"}]
ANSWERS = ["dog", "cat", "ran"]
RUNS = 400


def posterior_of(lm: LanguageModel) -> Posterior:
    return Posterior(tiny_policy(lm, "{x}", SUPPORT), lm.log_prob("{z} the {y}!", given="{x}"))


def exact(posterior: Posterior, row: dict[str, str]) -> list[float]:
    """sum_z q(z) p(" the y!" | x z .) for each answer, normalised, by plain passes."""
    lm = posterior.lm
    q = policy_log_probs(posterior.policy, row).exp()
    total = []
    for answer in ANSWERS:
        p = 0.0
        for z, weight in zip(support_completions(posterior.policy), q.tolist(), strict=True):
            before = [*lm.encode_start(row["x"]), *z, *plain_ids(lm, ".")]
            whole = [*before, *plain_ids(lm, f" the {answer}!")]
            p += weight * math.exp(sequence_log_prob(lm.model, whole, len(before)))
        total.append(p)
    return [p / sum(total) for p in total]


def z_scores(posterior: Posterior, truth: list[float]) -> tuple[float, float]:
    """(z of the mean over runs, mean of reported error / true spread) for the first answer."""
    found = [posterior.predict(ROWS[0], ANSWERS, 16, seed=s) for s in range(RUNS)]
    probs = torch.tensor([p.probs[0] for p in found]).double()
    errors = torch.tensor([p.errors[0] for p in found]).double()
    spread = probs.std()
    return ((probs.mean() - truth[0]) / (spread / RUNS**0.5)).item(), (errors.mean() / spread).item()


@pytest.mark.slow
def test_predictive_agrees_with_enumeration(one_lm: LanguageModel) -> None:
    posterior = posterior_of(one_lm)
    truth = exact(posterior, ROWS[0])
    z, error_ratio = z_scores(posterior, truth)
    limit = -torch.special.ndtri(torch.tensor(LEVEL / 2, dtype=torch.float64)).item()
    # A ratio of means is biased by O(1/n): allow 16 samples' worth of the squared relative error beside the noise.
    assert abs(z) < limit + 1.0
    assert 0.8 < error_ratio < 1.2
    # Control: the predictive of the untrained model is another one.
    untrained = Posterior(Policy(one_lm, "{x}", SUPPORT), posterior.target)
    assert abs(z_scores(untrained, truth)[0]) > limit + 1.0


def test_rows_at_once_equal_rows_alone(one_lm: LanguageModel) -> None:
    posterior = posterior_of(one_lm)
    for row, together in zip(ROWS, posterior.predict(ROWS, ANSWERS, 8), strict=True):
        alone = posterior.predict(row, ANSWERS, 8)
        assert together.probs == pytest.approx(alone.probs, abs=1e-5)
        assert sum(alone.probs) == pytest.approx(1)
        assert alone.best == ANSWERS[max(range(3), key=alone.probs.__getitem__)]
        assert 0 < alone.mass < 1
    assert len(posterior.predict(ROWS[:1], ANSWERS, 2)) == len(posterior.vote(ROWS[:1], 2)) == 1
    assert posterior.vote(ROWS, 8) == [posterior.vote(row, 8) for row in ROWS]


def greedy_answer(lm: LanguageModel, ids: list[int]) -> str:
    """What the model writes after `ids` until "!", at most three tokens, by plain passes."""
    stop, answer = plain_ids(lm, "!")[0], []
    banned = [*lm.special_ids, *range(len(lm.tokenizer), lm.vocab_size)]
    while len(answer) < 3:
        logits = lm.model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
        logits[banned] = -torch.inf
        if not answer:
            logits[stop] = -torch.inf
        token = int(logits.argmax())
        if token == stop:
            break
        answer.append(token)
    return lm.decode(answer).strip()


def test_votes_count_the_greedy_answers(one_lm: LanguageModel) -> None:
    """Of two rows at once, whose prompts differ in length."""
    posterior = posterior_of(one_lm)
    votes = posterior.vote(ROWS, 32, max_tokens=3, seed=4)
    rollouts, _ = posterior.policy.sample(ROWS, 32, seed=4)
    counts: list[dict[str, int]] = [{}, {}]
    for row, z in zip(rollouts.row_index.tolist(), rollouts.completions(), strict=True):
        before = [
            *one_lm.encode_start(ROWS[row]["x"]),
            *z,
            *plain_ids(one_lm, "."),
            *plain_ids(one_lm, " the"),
        ]
        text = greedy_answer(one_lm, before)
        counts[row][text] = counts[row].get(text, 0) + 1
    assert [v.counts for v in votes] == counts
    assert counts[0] != counts[1]
    for found, counted in zip(votes, counts, strict=True):
        assert found.best == max(counted, key=counted.__getitem__)
        assert found.share == counted[found.best] / 32
        assert found.error == pytest.approx(math.sqrt(found.share * (1 - found.share) / 32))


def test_errors_name_the_remedy(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    for target in (one_lm.log_prob("{z}", given="{x}"), one_lm.log_prob("{z} the cat", given="{x}")):
        with pytest.raises(ConfigError, match="one column"):
            Posterior(policy, target).predict(ROWS[0], ANSWERS)
    two = one_lm.log_prob("{z} the {y}") + one_lm.log_prob("{z}")
    with pytest.raises(ConfigError, match="one log_prob"):
        Posterior(policy, two).predict(ROWS[0], ANSWERS)
    shown = Posterior(tiny_policy(one_lm, "{x} {y}", SUPPORT), one_lm.log_prob("{z} the {y}", given="{x}"))
    with pytest.raises(ConfigError, match="take it out"):
        shown.predict(ROWS[0], ANSWERS)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-40, 1e-6])
def test_at_temperature_zero_z_is_the_greedy_one(one_lm: LanguageModel, temperature: float) -> None:
    posterior = posterior_of(one_lm)
    greedy = decode(posterior.policy, ROWS[:1], "greedy", 1).completions()[0]
    cold = posterior.predict(ROWS[0], ANSWERS, 8, temperature=temperature)
    likelihood = one_lm.log_prob(" the {y}!", given="{x}{z}")
    rollouts = posterior.policy.rollouts([{**ROWS[0], "y": a} for a in ANSWERS], [[greedy]] * len(ANSWERS))
    assert cold.probs == pytest.approx(likelihood.score_final(rollouts).softmax(0).tolist(), abs=1e-5)
    assert max(cold.errors) == pytest.approx(0, abs=1e-7), "every z is the same"
    votes = posterior.vote(ROWS[0], 5, temperature=temperature)
    assert list(votes.counts.values()) == [5]


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures_that_are_none_are_refused(one_lm: LanguageModel, temperature: float) -> None:
    posterior = posterior_of(one_lm)
    for ask in (posterior.predict, lambda *_, **k: posterior.vote(ROWS[0], **k)):
        with pytest.raises(
            ConfigError, match=r"a temperature must be a finite number, 0 \(greedy\) or above"
        ):
            ask(ROWS[0], ANSWERS, temperature=temperature)


def test_each_completion_has_its_own_temperature(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", min_tokens=3, max_tokens=3))
    heat = torch.tensor([0.0, 1e-30, 1.0, 1e30, 0.0])
    drawn, log_q = policy.sample(ROWS[:1], 5, seed=1, exploration=Exploration(heat))
    greedy = decode(policy, ROWS[:1], "greedy", 1).completions()[0]
    first, second, third, fourth, last = drawn.completions()
    assert first == second == last == greedy
    assert greedy not in (third, fourth)
    assert third == policy.sample(ROWS[:1], 5, seed=1)[0].completions()[2]
    assert torch.allclose(policy.evaluate(drawn).log_pf, log_q.log_pf, atol=1e-5)


def test_decoding_at_a_tiny_temperature_is_greedy(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    greedy = decode(policy, ROWS, "greedy", 1).completions()
    for method in ("temperature", "nucleus", "top_k"):
        assert decode(policy, ROWS, method, 1, temperature=1e-40).completions() == greedy
    best = decode(policy, ROWS, "resampling", 3, n=50, temperature=1e-40).completions()
    assert best[0] == best[1] == best[2]


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, math.nan])
def test_a_share_of_uniform_choices_is_a_share(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Exploration(epsilon=epsilon)
