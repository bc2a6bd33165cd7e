"""Terms that mention single statements, and constraints between them, against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import plain_ids, random_rollouts, sequence_log_prob, tiny_policy
from structured_cases import ROW, ROWS, SUPPORTS, TWO, plain_lists

from amortlm import (
    GFNConfig,
    GFNTrainer,
    LanguageModel,
    Posterior,
    Support,
    Unordered,
    constraint,
    exact,
)
from amortlm.errors import ConfigError, RewardError, SupportError, TemplateError
from amortlm.support.lists import split_statements
from amortlm.targets import Target
from amortlm.targets.functions import references
from amortlm.targets.laws import check_target
from amortlm.targets.lm import LogProb
from amortlm.targets.spec import target_from_spec
from amortlm.text.template import Template
from amortlm.types import Rollouts

MORE = Support(stop=(".", "!"), max_tokens=6, allowed_tokens=TWO, separator=",", min_statements=2)
LONG = Support(stop=".", max_tokens=7, allowed_tokens=(" a", " cat", "s"), separator=",", min_statements=2)
# (of, given), and the text that is scored after the text that is given, with numbers for statements.
TERMS = {
    "first alone": (("{z1}:", "{x}"), [], [1, ":"]),
    "second alone": (("{y}", "{x}{z2} so"), [2, " so"], ["{y}"]),
    "second given first": (("{z2}!", "{x}{z1} the"), [1, " the"], [2, "!"]),
    "both, one twice": ((" so{z2}{y}{z1}?", "{x}{z2}:"), [2, ":"], [" so", 2, "{y}", 1, "?"]),
    "at the start": (("{y}", "{z1} ran{z2}"), None, ["{y}"]),
}


def list_rollouts(lm: LanguageModel, support: Support, count: int = 24) -> Rollouts:
    """Lists of every length, with all their stopping states, in both rows."""
    bound = support.bind(lm)
    every = [z for n in range(bound.min_tokens, bound.max_tokens + 1) for z in bound.completions(n)]
    chosen = [every[i * (len(every) - 1) // (count - 1)] for i in range(count)]
    width = max(map(len, chosen))
    tokens = torch.tensor([z + [0] * (width - len(z)) for z in chosen])
    return bound.rollouts(ROWS, torch.arange(count) % 2, tokens, torch.tensor([len(z) for z in chosen]))


def by_definition(lm: LanguageModel, kind: str, row: dict, statements: list[list[int]]) -> float:
    """The text as tokens, piece by piece, and log p of its scored end from one plain pass."""
    _, given, of = TERMS[kind]

    def ids(pieces: list) -> list[int]:
        found = [statements[p - 1] if isinstance(p, int) else plain_ids(lm, p.format(**row)) for p in pieces]
        return [i for part in found for i in part]

    if given is None:
        start = [*lm.encode_start(""), *statements[0], *plain_ids(lm, " ran"), *statements[1]]
    else:
        start = [*lm.encode_start(row["x"]), *ids(given)]
    return sequence_log_prob(lm.model, [*start, *ids(of)], len(start))


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_is_what_plain_passes_say(one_lm: LanguageModel, kind: str) -> None:
    term = one_lm.log_prob(*TERMS[kind][0])
    rollouts = list_rollouts(one_lm, MORE)
    separator, scores = one_lm.token_id(","), term.score(rollouts)
    where = rollouts.stop_mask.nonzero().tolist()
    assert len(where) > 24, "prefixes, too"
    for b, t in where:
        statements = split_statements(rollouts.tokens[b, :t].tolist(), separator)
        expected = by_definition(one_lm, kind, ROWS[int(rollouts.row_index[b])], statements)
        assert scores[b, t].item() == pytest.approx(expected, abs=1e-3)


PROGRAM = {
    "a program": lambda lm: (
        lm.log_prob("{z1}:", given="{x}")
        + lm.log_prob("{z2}:", given="{x}{z1} the")
        + 0.5 * lm.log_prob("{y}", given="a{z1}.")
    ),
    "beside the whole list": lambda lm: lm.log_prob("{z}{y}", given="{x}") + lm.log_prob("{y}", given="the{z2}"),
    "in an unordered list": lambda lm: Unordered(lm.log_prob("{z}") + lm.log_prob("{y}", given="{z1}."), ","),
    "distinct": lambda lm: lm.log_prob("{z}") + constraint.distinct(),
    "distinct, penalised": lambda lm: lm.log_prob("{z}") + constraint.distinct(penalty=3.0),
    "relation": lambda lm: lm.log_prob("{z}") + constraint.relation(shorter),
    "relation of the row": lambda lm: lm.log_prob("{z}") + constraint.relation(not_in_x, penalty=2.0),
}  # fmt: skip


def shorter(statements: list[str]) -> bool:
    return len(statements[0]) < len(statements[1])


def not_in_x(statements: list[str], row: dict) -> bool:
    return statements[1] not in row["x"]


@pytest.mark.parametrize("kind", PROGRAM)
def test_programs_and_constraints_obey_the_laws(one_lm: LanguageModel, kind: str) -> None:
    check_target(PROGRAM[kind](one_lm), list_rollouts(one_lm, MORE))


@pytest.mark.parametrize("kind", [*PROGRAM])
def test_they_keep_their_spec(one_lm: LanguageModel, kind: str) -> None:
    target = PROGRAM[kind](one_lm)
    rollouts = list_rollouts(one_lm, MORE, 8)
    again = target_from_spec(target.to_spec(), one_lm, _trust())
    assert again.to_spec() == (1.0 * target).to_spec()
    assert torch.equal(again.score(rollouts), target.score(rollouts))


def _trust():
    from amortlm.targets.functions import Trust

    return Trust([__name__])


def test_a_program_works_with_every_model(lm: LanguageModel) -> None:
    check_target(PROGRAM["a program"](lm), list_rollouts(lm, MORE, 6))


def test_the_posterior_of_a_program_is_exact(family_lm: LanguageModel) -> None:
    lm, support = family_lm, SUPPORTS["exactly two"]
    target = (
        lm.log_prob("{z1}:", given="{x}") + lm.log_prob("{y}", given="{x}{z2} so") + constraint.distinct()
    )
    found = exact.enumerate_posterior(target, support.bind(lm), ROW)
    by_hand = {}
    for z in plain_lists(support, lm):
        one, two = split_statements(z, lm.token_id(","))
        if lm.decode(one).strip() != lm.decode(two).strip():
            by_hand[tuple(z)] = sum(
                by_definition(lm, kind, ROW, [one, two]) for kind in ("first alone", "second alone")
            )
    log_r = torch.tensor([by_hand.get(tuple(z), -torch.inf) for z in found.completions], dtype=torch.float64)
    assert len(by_hand) < len(found.completions)
    assert found.log_z == pytest.approx(log_r.logsumexp(0).item(), abs=1e-3)
    torch.testing.assert_close(found.log_p.double(), log_r.log_softmax(0), atol=1e-3, rtol=0)


def test_distinct_is_about_texts_at_every_state(one_lm: LanguageModel) -> None:
    rollouts = list_rollouts(one_lm, LONG, 60)
    scores = constraint.distinct().bind(one_lm).score(rollouts)
    seen = set()
    for b, t in rollouts.stop_mask.nonzero().tolist():
        texts = one_lm.decode(rollouts.tokens[b, :t].tolist()).split(",")
        repeated = any(texts[i].strip() == texts[j].strip() for i in range(len(texts)) for j in range(i))
        seen.add(repeated)
        assert scores[b, t].item() == (-torch.inf if repeated else 0.0)
    assert seen == {True, False}


def test_a_repeated_finished_statement_is_never_mended(one_lm: LanguageModel) -> None:
    bound = LONG.bind(one_lm)
    a, s, comma = (one_lm.token_id(x) for x in (" a", "s", ","))
    z = torch.tensor([[a, comma, a, s, comma, a, s]])
    scores = constraint.distinct().bind(one_lm).score(bound.rollouts([ROW], torch.zeros(1, dtype=torch.long), z, torch.tensor([7])))  # fmt: skip
    assert scores[0].isneginf().nonzero().squeeze(1).tolist() == [3, 6, 7]
    # State 3, "a, a", is mended by a token more; state 6, "a, as, a", repeats the first; state 7 the second.


def test_a_set_of_a_list_has_the_law_of_the_unordered_list(one_lm: LanguageModel) -> None:
    """What more than five statements are told: leave `Unordered` out, and read a list as a set."""
    support = Support(stop=".", max_tokens=6, allowed_tokens=TWO, separator=",", min_statements=2).bind(
        one_lm
    )
    target = one_lm.log_prob("{z}{y}", given="{x}") / 4 + constraint.distinct()
    laws = []
    for each in (target, Unordered(target, ",")):
        found = exact.enumerate_posterior(each, support, ROW)
        law: dict[frozenset, float] = {}
        for z, p in zip(found.completions, found.log_p.exp().tolist(), strict=True):
            key = frozenset(map(tuple, split_statements(z, one_lm.token_id(","))))  # none is there twice
            law[key] = law.get(key, 0.0) + p
        laws.append(law)
    assert laws[0] == pytest.approx(laws[1], abs=1e-6)
    lists = [exact.enumerate_posterior(t, support, ROW).log_p for t in (target, Unordered(target, ","))]
    assert (lists[0].exp() - lists[1].exp()).abs().max() > 1e-3, "the lists themselves differ"


@pytest.mark.parametrize(
    ("of", "given", "message"),
    [
        ("{z1}", "{x}", "write what ends the statement"),
        ("{y}{z2}", "{x}{z1} a", "write what ends the statement"),
        ("{z2}.", "{x}{z1}", "write the text between the statements"),
        ("{z}", "{z1}.", "mention statements one by one"),
        ("{z1}{z2}{y}", "{z1} so", "mention statements one by one"),
        ("{y}", "{x}", "must appear exactly once"),
        ("{z1}.", [{"role": "user", "content": "{z2}"}], "cannot be inside chat messages"),
    ],
)
def test_unclear_terms_are_refused(one_lm: LanguageModel, of: str, given: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        one_lm.log_prob(of, given=given)


def test_single_statements_are_written_through_the_model(one_lm: LanguageModel) -> None:
    with pytest.raises(TemplateError, match=r"write it as lm.log_prob"):
        LogProb(one_lm, "{y}", "{z1}")


def test_a_template_says_where_statements_stand() -> None:
    template = Template("{x} so{z2} then {{{y}{z1}")
    assert template.numbers == [2, 1]
    assert template.columns == {"x", "y"}
    assert template.script({"x": "a", "y": "b"}) == ["a so", 2, " then {b", 1, ""]
    assert Template("{z1}{z2} so").numbers == []
    assert Template("{z}").numbers == []


def test_supports_without_these_statements_are_refused(one_lm: LanguageModel, tmp_path: Path) -> None:
    likelihood = one_lm.log_prob("{y}", given="{x}{z2}")
    Posterior(tiny_policy(one_lm, "{x}", MORE), likelihood)
    plain = Support(stop=".", max_tokens=5)
    for target, support, message in (
        (likelihood, SUPPORTS["any number"], "min_statements=2"),
        (likelihood, plain, "needs separator="),
        (one_lm.log_prob("{z}") + constraint.distinct(), plain, "needs separator="),
        (Unordered(likelihood, ","), SUPPORTS["any number"], "min_statements=2"),
    ):
        with pytest.raises(SupportError, match=message):
            Posterior(tiny_policy(one_lm, "{x}", support), target)
        with pytest.raises(SupportError, match=message):
            exact.enumerate_posterior(target, support.bind(one_lm), ROW)
    with pytest.raises(SupportError, match="min_statements=2"):
        GFNTrainer(
            one_lm,
            target=likelihood,
            prompt="{x}",
            support=SUPPORTS["any number"],
            train_dataset=ROWS,
            args=GFNConfig(output_dir=str(tmp_path)),
        )
    # Rollouts that are no lists, straight into a term.
    with pytest.raises(SupportError, match="separator="):
        likelihood.score(random_rollouts(one_lm, plain, ROWS))


def test_a_function_of_statements_has_the_errors_of_a_predicate(one_lm: LanguageModel) -> None:
    rollouts = list_rollouts(one_lm, SUPPORTS["any number"], 6)
    with pytest.raises(RewardError, match="IndexError"):
        constraint.relation(shorter).bind(one_lm).score(rollouts)
    with pytest.raises(RewardError, match="return True or False"):
        constraint.relation(lambda statements: len(statements)).bind(one_lm).score(rollouts)
    with pytest.raises(ConfigError, match="write `distinct: true`"):
        target_from_spec([{"distinct": False}], one_lm)


def test_terms_of_equal_statements_are_scored_once(
    one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term that reads z1 alone costs one text, however the list goes on."""
    term: Target = one_lm.log_prob("{y}", given="{x}{z1}.")
    bound = MORE.bind(one_lm)
    a, cat, comma = (one_lm.token_id(x) for x in (" a", " cat", ","))
    z = torch.tensor([[a, comma, a, cat, comma, a], [a, comma, cat, cat, comma, cat]])
    rollouts = bound.rollouts([ROW], torch.zeros(2, dtype=torch.long), z, torch.tensor([6, 6]))
    assert one_lm.sharing.packed  # the self-check is done
    seen = []
    logits = type(one_lm.passes).state_logits
    monkeypatch.setattr(
        type(one_lm.passes),
        "state_logits",
        lambda self, p, i, t: seen.append(len(t)) or logits(self, p, i, t),
    )
    scores = term.score(rollouts)
    assert sum(seen) == 1
    assert len(set(scores[rollouts.stop_mask].tolist())) == 1


def test_the_function_of_a_relation_runs_only_if_it_is_trusted(one_lm: LanguageModel) -> None:
    spec = [{"relation": "numpy:all"}, {"relation": {"function": "torch:all", "timeout": 1.0}}]
    assert list(references(spec)) == ["numpy:all", "torch:all"], "what the user is asked to trust"
    for term in spec:
        with pytest.raises(ConfigError, match="trust"):
            target_from_spec([term], one_lm)
