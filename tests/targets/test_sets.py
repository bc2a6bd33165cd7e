"""Lists whose order does not matter: `Unordered` against its definition."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from reference import tiny_policy
from structured_cases import ROW, ROWS, TWO

from amortlm import (
    LanguageModel,
    Posterior,
    Support,
    Unordered,
    constraint,
    exact,
    verifier,
)
from amortlm.engine.prefix import pad_right
from amortlm.errors import ConfigError, SupportError
from amortlm.targets import Target
from amortlm.targets.laws import check_target
from amortlm.targets.spec import target_from_spec
from amortlm.types import Rollouts

SETS = Support(stop=".", max_tokens=6, allowed_tokens=TWO, separator=",", max_statements=3)


def list_rollouts(lm: LanguageModel, support: Support, n: int = 12) -> Rollouts:
    """Lists of every length, spread over the support, in both rows."""
    bound = support.bind(lm)
    every = [z for length in range(1, bound.max_tokens + 1) for z in bound.completions(length)]
    chosen = [every[i * (len(every) - 1) // (n - 1)] for i in range(n)]
    tokens, lengths = pad_right(chosen, "cpu")
    return bound.rollouts(ROWS, torch.arange(n) % 2, tokens, lengths)


def first_word_is_a(texts: list[str], rows: list[dict]) -> list[float]:
    return [
        -0.3 * len(r["x"]) if t.startswith(" a") else -1.0 * len(t) for t, r in zip(texts, rows, strict=True)
    ]


INNER = {
    "list": lambda lm: lm.log_prob("{z}", given="{x}"),
    "infilling": lambda lm: lm.log_prob("{z}{y}", given="{x}") / 2,
    "sum": lambda lm: lm.log_prob("{z}") - 0.5 * lm.log_prob("{z}", given="{x}"),
    "hard": lambda lm: lm.log_prob("{z}") + constraint.matches("cat.*"),
    "black box": lambda lm: lm.log_prob("{z}") + verifier(first_word_is_a),
    "black box alone": lambda lm: verifier(first_word_is_a, every_prefix=True),
}


def mean_over_orders(target: Target, lm: LanguageModel, rollouts: Rollouts) -> torch.Tensor:
    """The definition, string by string: decoded, split at the commas, permuted, encoded again."""
    bound = SETS.bind(lm)
    comma = lm.token_id(",")
    out = torch.zeros(rollouts.stop_mask.shape)
    mask = rollouts.stop_mask if target.every_prefix else rollouts.final_only().stop_mask
    for b, t in mask.nonzero().tolist():
        z, pieces = rollouts.tokens[b, :t].tolist(), [[]]
        for token in z:
            pieces = [*pieces, []] if token == comma else [*pieces[:-1], [*pieces[-1], token]]
        scores = []
        for order in permutations(pieces):  # n! of them, equal ones as often as they come
            joined = [token for piece in order for token in (comma, *piece)][1:]
            tokens, lengths = pad_right([joined], "cpu")
            row = rollouts.rows[int(rollouts.row_index[b])]
            scores.append(target.score_final(bound.rollouts([row], torch.tensor([0]), tokens, lengths)))
        out[b, t] = torch.cat(scores).double().logsumexp(0) - math.log(len(scores))
    return out


@pytest.mark.parametrize("name", INNER)
def test_unordered_is_the_mean_over_all_orders(one_lm: LanguageModel, name: str) -> None:
    inner = INNER[name](one_lm).bind(one_lm)
    target = Unordered(inner, ",").bind(one_lm)
    rollouts = list_rollouts(one_lm, SETS)
    expected = mean_over_orders(inner, one_lm, rollouts)
    mask = rollouts.stop_mask if inner.every_prefix else rollouts.final_only().stop_mask
    torch.testing.assert_close(target.score(rollouts)[mask], expected[mask], atol=1e-4, rtol=0)
    assert not torch.allclose(inner.score(rollouts)[mask], expected[mask], atol=0.1), (
        "the order matters inside"
    )


def test_rows_share_no_pass(one_lm: LanguageModel) -> None:
    """A completion of one row that begins one of another row is scored with its own prompt."""
    inner, bound = INNER["list"](one_lm), SETS.bind(one_lm)
    a, cat = one_lm.token_id(" a"), one_lm.token_id(" cat")
    tokens, lengths = pad_right([[a], [a, cat]], "cpu")
    rollouts = bound.rollouts(ROWS, torch.tensor([0, 1]), tokens, lengths).final_only()
    torch.testing.assert_close(Unordered(inner, ",").score(rollouts), inner.score(rollouts))


@pytest.mark.parametrize("name", INNER)
def test_unordered_obeys_the_laws(one_lm: LanguageModel, name: str) -> None:
    target = Unordered(INNER[name](one_lm), ",").bind(one_lm)
    check_target(target, list_rollouts(one_lm, SETS, n=8))


def test_the_order_changes_nothing_and_the_mass_stays(one_lm: LanguageModel) -> None:
    inner = one_lm.log_prob("{z}{y}", given="{x}") / 3
    bound, comma = SETS.bind(one_lm), one_lm.token_id(",")
    ordered = exact.enumerate_posterior(inner, bound, ROW)
    unordered = exact.enumerate_posterior(Unordered(inner, ","), bound, ROW)
    assert unordered.log_z == pytest.approx(ordered.log_z, abs=1e-4)

    def spread(posterior: exact.ExactPosterior) -> float:
        """The largest difference of log p within a set."""
        groups: dict = {}
        for z, log_p in zip(posterior.completions, posterior.log_p.tolist(), strict=True):
            statements = bound.statements(z)
            assert sum(map(len, statements)) + len(statements) - 1 == len(z)
            groups.setdefault(tuple(sorted(map(tuple, statements))), []).append(log_p)
        return max(max(g) - min(g) for g in groups.values())

    assert spread(unordered) < 1e-4
    assert spread(ordered) > 0.5
    assert comma == bound.lists.separator


def test_unordered_needs_a_support_that_fits(one_lm: LanguageModel) -> None:
    target = Unordered(one_lm.log_prob("{z}"), ",")
    six = Support(stop=".", max_tokens=12, separator=",")
    for support, message in (
        (six, "up to 5 statements, but the support allows 6: lower its max_statements"),
        (Support(stop=".", max_tokens=4), "the support has another separator or none"),
        (Support(stop=".", max_tokens=4, separator=":"), "give both the same separator="),
    ):
        with pytest.raises(SupportError, match=message):
            Posterior(tiny_policy(one_lm, "{x}", support), target)
    bound = six.bind(one_lm)
    long, lengths = pad_right([[5, *[bound.lists.separator, 5] * 5]] * 2, "cpu")
    with pytest.raises(SupportError, match="up to 5 statements"):
        target.score(bound.rollouts([ROW], torch.tensor([0, 0]), long, lengths))
    with pytest.raises(ConfigError, match=r"call target.bind\(lm\)"):
        Unordered(constraint.contains("a"), ",").score(list_rollouts(one_lm, SETS))


def test_unordered_and_lists_are_saved(one_lm: LanguageModel, tmp_path: Path) -> None:
    target = 0.5 * Unordered(
        one_lm.log_prob("{z}", given="{x}") / 2 + constraint.contains("a", penalty=2.0), ","
    )
    support = Support(**SETS.to_dict())
    assert support.to_dict() == SETS.to_dict()
    posterior = Posterior(tiny_policy(one_lm, "{x}", support), target)
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path, lm=one_lm)
    assert again.policy.support.lists == posterior.policy.support.lists
    assert again.sample(ROW, 4, seed=1) == posterior.sample(ROW, 4, seed=1)
    assert again.target.to_spec() == target.to_spec()
    with pytest.raises(ConfigError, match="unordered"):
        target_from_spec([{"unordered": {"separator": ","}}], one_lm)
