"""The posterior as a table: exact by enumeration, and from draws with masses whose errors are honest."""

from __future__ import annotations

import json
import math

import pytest
import torch
from reference import tiny_policy
from torch import Tensor

from amortlm import LanguageModel, Posterior, Support, constraint
from amortlm.errors import ConfigError, DataError, RewardError
from amortlm.inference.exact import enumerate_posterior, policy_log_probs
from amortlm.inference.table import Table, total

ROW = {"x": "the dog", "y": " ran"}
SUPPORT = Support(stop=(".", "!"), min_tokens=1, max_tokens=3, allowed_tokens=(" a", " cat", " dog", "s"))


@pytest.fixture
def posterior(one_lm: LanguageModel) -> Posterior:
    return Posterior(tiny_policy(one_lm, "{y}{x}", SUPPORT), one_lm.log_prob("{z}{y}", given="{x}") / 0.9)


def by_enumeration(posterior: Posterior) -> tuple[dict[tuple[int, ...], tuple[float, float]], float]:
    """(p, q) of each completion, and log Z."""
    assert posterior.target is not None
    exact = enumerate_posterior(posterior.target, posterior.policy.support, ROW)
    q = policy_log_probs(posterior.policy, ROW).exp().tolist()
    return dict(
        zip(map(tuple, exact.completions), zip(exact.log_p.exp().tolist(), q, strict=True), strict=True)
    ), exact.log_z


def test_an_exact_table(posterior: Posterior) -> None:
    truth, log_z = by_enumeration(posterior)
    table = posterior.table(ROW, top=7)
    assert (table.method, table.known, table.draws, table.log_z) == ("enumeration", 84, 0, log_z)
    assert [x.p for x in table.lines] == sorted((p for p, _ in truth.values()), reverse=True)[:7]
    assert all((x.p, x.q) == truth[tuple(x.tokens)] for x in table.lines)
    assert [x.text for x in table.lines] == [posterior.lm.decode(x.tokens) for x in table.lines]
    assert table.p_unlisted == pytest.approx(1 - sum(x.p for x in table.lines), abs=1e-12)
    assert table.q_unlisted == pytest.approx(1 - sum(x.q for x in table.lines), abs=1e-12)
    samples = {tuple(s.tokens): s.log_reward for s in posterior.sample(ROW, 50)}
    for x in table.lines:
        if tuple(x.tokens) in samples:
            assert x.log_r == pytest.approx(samples[tuple(x.tokens)], abs=1e-4)


def test_texts_are_those_of_samples(posterior: Posterior, one_lm: LanguageModel) -> None:
    """With the stop symbol, unless it is special; without, where p sums over several."""
    special = one_lm.tokenizer.eos_token
    for stop, end in ((".", "."), (special, "")):
        support = Support(stop=stop, min_tokens=1, max_tokens=2, allowed_tokens=(" a", " cat"))
        single = Posterior(tiny_policy(one_lm, "{x}", support), one_lm.log_prob("{z}", given="{x}"))
        drawn = {tuple(s.tokens): s.text for s in single.sample(ROW, 60)}
        assert len(drawn) > 2
        for limit in (1000, 0):
            lines = single.table(ROW, 60, limit=limit).lines
            assert all(x.text.endswith(end or ("a", "cat")) for x in lines)
            assert drawn.items() <= {tuple(x.tokens): x.text for x in lines}.items()
    assert not any(x.text.endswith((".", "!")) for x in posterior.table(ROW).lines)


def test_a_table_of_everything_leaves_nothing_out(posterior: Posterior) -> None:
    table = posterior.table(ROW, top=100)
    assert len(table.lines) == 84
    assert table.p_unlisted == pytest.approx(0, abs=1e-5)


def test_a_drawn_table_is_near_the_exact_one(posterior: Posterior) -> None:
    """At four standard errors: a false alarm in 16,000 for a normal error; the seed is fixed."""
    truth, log_z = by_enumeration(posterior)
    table = posterior.table(ROW, 128, limit=83, top=3)
    assert (table.method, table.draws, len(table.lines)) == ("draws", 256, 3)
    assert abs(table.log_z - log_z) < 4 * table.log_z_error
    for x in table.lines:
        p, q = truth[tuple(x.tokens)]
        assert x.q == pytest.approx(q, rel=1e-4)
        assert x.p == pytest.approx(p * math.exp(log_z - table.log_z), rel=1e-3), "R / Z"
    unlisted = 1 - sum(truth[tuple(x.tokens)][0] for x in table.lines)
    assert abs(table.p_unlisted - unlisted) < 4 * table.p_error
    assert table.p_unlisted > 0.01
    assert f"{table.p_unlisted:.3f} +- {table.p_error:.3f}" in str(table)


@pytest.mark.slow
def test_the_estimate_of_z_has_no_bias(posterior: Posterior) -> None:
    """z-test of the mean of 40 tables at 4.5 standard errors; control: naming completions from the same draws is biased."""
    truth, log_z = by_enumeration(posterior)
    tables = [posterior.table(ROW, 12, limit=0, seed=seed) for seed in range(40)]
    z = torch.tensor([t.log_z - log_z for t in tables], dtype=torch.float64).exp()
    assert abs(z_score(z)) < 4.5
    only_named = torch.tensor([sum(truth[tuple(x.tokens)][0] for x in t.lines) for t in tables])
    assert z_score(only_named.double()) < -4.5


def z_score(x: Tensor) -> float:
    return ((x.mean() - 1) / (x.std() / math.sqrt(len(x)))).item()


def test_total() -> None:
    log_r, log_w = torch.tensor([2.0, 3.0]).log().double(), torch.tensor([0.0, 0.0, 4.0, 8.0]).log().double()
    log_z, error = total(log_r, log_w)
    assert math.exp(log_z) == pytest.approx(8)
    assert error == pytest.approx(torch.tensor([0.0, 0.0, 4.0, 8.0]).std().item() / 2 / 8)
    assert total(torch.zeros(0).double(), log_w)[0] == pytest.approx(math.log(3))


def test_where_nothing_is_left_the_error_is_unknown(one_lm: LanguageModel) -> None:
    support = Support(stop=".", max_tokens=1, allowed_tokens=(" a", " cat"))
    posterior = Posterior(tiny_policy(one_lm, "{x}", support), one_lm.log_prob("{z}", given="{x}"))
    table = posterior.table(ROW, 200, limit=0)
    assert len(table.lines) == 2
    assert math.isnan(table.log_z_error)
    assert math.isnan(table.p_error)
    assert "unknown" in str(table)
    assert table.to_dict()["p_error"] is None


def test_rejected_completions_are_not_listed(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}", given="{x}") + constraint.contains("dog")
    table = Posterior(tiny_policy(one_lm, "{x}", SUPPORT), target).table(ROW, 64, limit=0)
    assert table.lines
    assert all("dog" in x.text for x in table.lines)


def test_where_all_is_rejected(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}", given="{x}") + constraint.contains("zebra")
    with pytest.raises(RewardError, match="all 128 completions drawn have R = 0"):
        Posterior(tiny_policy(one_lm, "{x}", SUPPORT), target).table(ROW, 64, limit=0)


def test_a_table_prints_and_is_json(posterior: Posterior) -> None:
    for table in (posterior.table(ROW, top=3), posterior.table(ROW, 32, limit=0, top=3)):
        lines = str(table).splitlines()
        assert lines[0].split() == ["completion", "p", "q", "log", "R"]
        assert lines[2].split()[-3:] == [
            f"{table.lines[0].p:.4f}",
            f"{table.lines[0].q:.4f}",
            f"{table.lines[0].log_r:.3f}",
        ]
        assert lines[5].startswith("(all others)")
        again = json.loads(json.dumps(table.to_dict()))
        assert [x["text"] for x in again["lines"]] == [x.text for x in table.lines]
        assert set(again) == set(Table.__dataclass_fields__)


def test_what_a_table_refuses(posterior: Posterior, one_lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="n >= 2 draws and top >= 1"):
        posterior.table(ROW, 1)
    with pytest.raises(DataError):
        posterior.table({"x": "a"})
    with pytest.raises(ConfigError, match="target"):
        Posterior(posterior.policy, None).table(ROW)
