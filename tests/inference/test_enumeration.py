"""The exact posterior of a small support against a plain loop over its completions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reference import plain_ids, sequence_log_prob, slow_log_q, tiny_policy

from amortlm import LanguageModel, Support, constraint
from amortlm.errors import SupportError
from amortlm.inference.exact import distance, enumerate_posterior, policy_log_probs

ROW = {"x": "the dog", "y": " ran"}
SUPPORT = Support(stop=(".", "!"), min_tokens=0, max_tokens=2, allowed_tokens=(" a", " cat", "s"))


def all_strings(lm: LanguageModel) -> list[list[int]]:
    allowed = [lm.token_id(t) for t in SUPPORT.allowed_tokens or ()]
    return [list(z) for n in range(3) for z in itertools.product(allowed, repeat=n)]


def brute_force(lm: LanguageModel, strings: list[list[int]]) -> list[float]:
    """log p(z s y | x) / 0.8 summed over both stop symbols; -inf unless the text contains "cat"."""
    given = lm.encode_start(ROW["x"])
    after = plain_ids(lm, ROW["y"])
    out = []
    for z in strings:
        per_stop = [
            sequence_log_prob(lm.model, [*given, *z, lm.token_id(s), *after], len(given)) for s in ".!"
        ]
        ok = "cat" in lm.decode(z)
        out.append(math.log(sum(map(math.exp, per_stop))) / 0.8 if ok else -math.inf)
    return out


def test_enumeration_equals_a_plain_loop(family_lm: LanguageModel) -> None:
    lm = family_lm
    target = lm.log_prob("{z}{y}", given="{x}") / 0.8 + constraint.predicate(lambda text: "cat" in text)
    exact = enumerate_posterior(target, SUPPORT.bind(lm), ROW)
    strings = all_strings(lm)
    assert len(exact.completions) == 1 + 3 + 9
    assert sorted(exact.completions) == sorted(strings)
    log_r = brute_force(lm, exact.completions)
    log_z = math.log(sum(map(math.exp, log_r)))
    assert exact.log_z == pytest.approx(log_z, abs=1e-4)
    expected = torch.tensor(log_r, dtype=torch.float64) - log_z
    torch.testing.assert_close(exact.log_p, expected, atol=1e-4, rtol=0)
    assert exact.log_p.dtype == torch.float64
    assert exact.log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert torch.isneginf(exact.log_p).sum() == 1 + 2 + 4


def test_policy_log_probs_come_in_the_order_of_the_enumeration(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    exact = enumerate_posterior(one_lm.log_prob("{z}"), policy.support, ROW)
    log_q = policy_log_probs(policy, ROW)
    prompt = policy.encode_rows([ROW])[0]
    for got, z in zip(log_q.tolist(), exact.completions, strict=True):
        log_pf, log_pterm = slow_log_q(policy, prompt, z)
        assert got == pytest.approx(sum(log_pf) + log_pterm[-1], abs=1e-4)
    assert log_q.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_more_strings_than_one_pass_takes(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = enumerate_posterior(one_lm.log_prob("{z}"), SUPPORT.bind(one_lm), ROW)
    monkeypatch.setattr("amortlm.inference.exact.CHUNK", 2)
    parts = enumerate_posterior(one_lm.log_prob("{z}"), SUPPORT.bind(one_lm), ROW)
    assert parts.completions == whole.completions
    torch.testing.assert_close(parts.log_p, whole.log_p, atol=1e-5, rtol=0)


def test_too_large_a_support_says_what_to_do(one_lm: LanguageModel) -> None:
    target, support = one_lm.log_prob("{z}"), SUPPORT.bind(one_lm)
    assert len(enumerate_posterior(target, support, ROW, limit=13).completions) == 13
    with pytest.raises(
        SupportError, match=r"13 completions, more than the limit of 12 .*narrow it .*raise `limit`"
    ):
        enumerate_posterior(target, support, ROW, limit=12)
    wide = Support(stop=".", max_tokens=25).bind(one_lm)
    with pytest.raises(SupportError, match=r"10\^41\.3 completions"):
        enumerate_posterior(target, wide, ROW)


def test_an_empty_posterior_says_what_to_do(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}") + constraint.contains("dog")
    with pytest.raises(
        SupportError, match="R = 0 for every completion of the support; relax the constraints"
    ):
        enumerate_posterior(target, SUPPORT.bind(one_lm), ROW)


def test_distance_of_a_distribution_to_itself_is_zero() -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().log()
    d = distance(log_p, log_p)
    assert (d.total_variation, d.kl_qp, d.kl_pq) == (0.0, 0.0, 0.0)
    assert d.mass == pytest.approx(1.0)


def test_distance_of_disjoint_distributions() -> None:
    d = distance(torch.tensor([0.4, 0.6, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log())
    assert d.total_variation == pytest.approx(1.0)
    assert d.kl_qp == d.kl_pq == math.inf


def test_distance_by_hand() -> None:
    """q = (1/2, 1/2, 0), p = (1/4, 1/4, 1/2): KL(q || p) = log 2, KL(p || q) = inf, TV = 1/2."""
    d = distance(torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log())
    assert d.total_variation == pytest.approx(0.5)
    assert d.kl_qp == pytest.approx(math.log(2))
    assert d.kl_pq == math.inf
    back = distance(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log())
    assert back.kl_qp == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert back.kl_pq == pytest.approx(-0.5 * math.log(1.8) - 0.5 * math.log(0.2), abs=1e-6)


def test_mass_shows_a_q_that_does_not_sum_to_one() -> None:
    assert distance(torch.tensor([0.5, 0.3]).log(), torch.tensor([0.5, 0.5]).log()).mass == pytest.approx(0.8)
