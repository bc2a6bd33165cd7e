"""The algebra of targets, constraints and verifiers, and the errors that say how to repair a target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference import random_rollouts

from amortlm.errors import ConfigError, DataError, RewardError, TemplateError
from amortlm.language_model import LanguageModel
from amortlm.support import Support
from amortlm.targets import Target, constraints
from amortlm.targets.base import LinearCombination, Scoring, Softened
from amortlm.targets.functions import Trust
from amortlm.targets.spec import target_from_spec
from amortlm.types import Rollouts, Row

ROWS: list[Row] = [{"x": "the dog", "y": " the cat ran."}, {"x": "a", "y": " a"}]
SUPPORT = Support(stop=".", min_tokens=0, max_tokens=3)


@pytest.fixture
def rollouts(one_lm: LanguageModel) -> Rollouts:
    return random_rollouts(one_lm, SUPPORT, ROWS, per_row=4)


def of_texts(lm: LanguageModel, *texts: str, row: Row | None = None) -> Rollouts:
    """Finished completions only, from texts."""
    bound = Support(stop=".", min_tokens=0, max_tokens=20).bind(lm)
    ids = [lm.encode_continuation(t) for t in texts]
    width = max(1, *map(len, ids))
    tokens = torch.tensor([z + [0] * (width - len(z)) for z in ids], dtype=torch.long)
    lengths = torch.tensor([len(z) for z in ids])
    index = torch.zeros(len(ids), dtype=torch.long)
    return bound.rollouts([row or ROWS[0]], index, tokens, lengths)


def holds(lm: LanguageModel, constraint: Target, *texts: str, row: Row | None = None) -> list[bool]:
    scores = constraint.bind(lm).score_final(of_texts(lm, *texts, row=row))
    assert set(scores.tolist()) <= {0.0, -math.inf}
    return (scores == 0).tolist()


# Algebra


class Constant(Target):
    def __init__(self, value: float, name: str = "constant"):
        self.value, self.name = value, name
        self.columns = frozenset({name})

    def score_batch(self, scoring: Scoring) -> torch.Tensor:
        return torch.full(scoring.rollouts.stop_mask.shape, self.value)


A, B = Constant(2.0, "a"), Constant(-3.0, "b")


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (A + B, -1.0),
        (A - B, 5.0),
        (-A, -2.0),
        (3 * A, 6.0),
        (A * 3, 6.0),
        (A / 0.5, 4.0),
        ((A + B) / 0.5, -2.0),
        (1.5 * A - 0.5 * B, 4.5),
        (A + 2 * (B - 0.5 * A), -6.0),
        (LinearCombination([(0.0, Constant(math.inf)), (2.0, A)]), 4.0),
    ],
)
def test_algebra(target: Target, value: float, rollouts: Rollouts) -> None:
    scores = target.score(rollouts)
    torch.testing.assert_close(scores, torch.where(rollouts.stop_mask, value, 0.0))
    assert scores.dtype == torch.float32


def test_nothing_to_score_costs_nothing(one_lm: LanguageModel, rollouts: Rollouts) -> None:
    target = one_lm.log_prob("{z}{y}", given="{x}")
    assert target.score(rollouts).any()
    nowhere = replace(rollouts, stop_mask=torch.zeros_like(rollouts.stop_mask))
    assert not target.score(nowhere).any()


def test_a_sum_knows_its_columns_and_prefixes() -> None:
    assert (A + B).columns == {"a", "b"}
    assert (A + B).every_prefix
    assert not (A + constraints.verifier(lambda texts, rows: [0.0])).every_prefix


def test_operands_are_not_changed(rollouts: Rollouts) -> None:
    total = A + B
    _ = 2 * total - A
    torch.testing.assert_close(total.score(rollouts), torch.where(rollouts.stop_mask, -1.0, 0.0))


def test_a_sum_without_terms_is_refused() -> None:
    with pytest.raises(RewardError, match="at least one term with a weight other than 0"):
        0 * A


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(RewardError, match="a temperature must be positive, got"):
        A / temperature


def test_a_hard_constraint_cannot_be_subtracted() -> None:
    with pytest.raises(RewardError, match=r"contains\(\['a'\]\) is a hard constraint: a negative weight"):
        A - constraints.contains("a")
    _ = A - constraints.contains("a", penalty=2.0)


# Values that are not rewards


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_infinity_are_refused(one_lm: LanguageModel, rollouts: Rollouts, bad: float) -> None:
    def score(texts: list[str], rows: list[Row]) -> list[float]:
        return [0.0] * (len(texts) - 1) + [bad]

    target = one_lm.log_prob("{z}") + constraints.verifier(score)
    with pytest.raises(
        RewardError, match=r"^verifier\(.*score\) gave NaN or \+inf for '.*'; return finite numbers"
    ):
        target.score(rollouts)


def test_an_impossible_text_with_a_negative_weight_is_refused(
    one_lm: LanguageModel, rollouts: Rollouts
) -> None:
    never = constraints.verifier(lambda texts, rows: [-math.inf] * len(texts)).bind(one_lm)
    assert torch.isneginf(never.score_final(rollouts)).all()
    with pytest.raises(RewardError, match=r"NaN or \+inf"):
        (A - never).score(rollouts)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_verifier_returns_one_score_per_text(one_lm: LanguageModel, rollouts: Rollouts, extra: int) -> None:
    target = constraints.verifier(lambda texts, rows: [0.0] * (len(texts) + extra)).bind(one_lm)
    n = len(rollouts)
    with pytest.raises(
        RewardError, match=rf"returned {n + extra} scores for {n} texts; return one number per text"
    ):
        target.score(rollouts)


# Constraints and verifiers


def test_contains(one_lm: LanguageModel) -> None:
    both = constraints.contains("cat", "dog")
    texts = ("a dog, the cat", "the Cat".lower() + " ran", "cats and dogs", "dog cat", "", "cat:dog!")
    assert holds(one_lm, both, *texts) == [True, False, False, True, False, True]
    assert holds(one_lm, constraints.contains("DOG"), " the dog") == [True]
    assert holds(one_lm, constraints.contains("a.b"), "acb", "a.b".replace(".", "x")) == [False, False]


def test_matches_reads_the_whole_text_without_outer_space(one_lm: LanguageModel) -> None:
    texts = ("abc", " abc", "abcd", "xabc", "")
    assert holds(one_lm, constraints.matches("[a-c]+"), *texts) == [True, True, False, False, False]


def test_allowed_tokens(one_lm: LanguageModel) -> None:
    allowed = constraints.allowed_tokens("a", " cat", one_lm.token_id("b"))
    assert holds(one_lm, allowed, "ab", " cat", "abc", "", "cab") == [True, True, False, True, False]


def test_canonical(one_lm: LanguageModel) -> None:
    """ " cat" is one token for this tokenizer, and could be written as a space and three letters."""
    space, *letters = (one_lm.token_id(t) for t in (" ", "c", "a", "t"))
    bound = Support(stop=".", min_tokens=0, max_tokens=5).bind(one_lm)
    tokens = torch.tensor([[space, *letters, 0], [one_lm.token_id(" cat"), letters[1], 0, 0, 0]])
    rollouts = bound.rollouts(ROWS, torch.tensor([0, 1]), tokens, torch.tensor([4, 2]))
    ok = constraints.canonical().bind(one_lm).score(rollouts) == 0
    # " c" and " cat" are tokens, so from two characters on there is a shorter way to write it.
    assert ok[0].tolist() == [True, True, False, False, False, True]
    assert ok[1, :3].tolist() == [True, True, True]


def test_length(one_lm: LanguageModel) -> None:
    texts = ("", "a", "ab", "abc")
    assert holds(one_lm, constraints.length(1, 2), *texts) == [False, True, True, False]
    assert holds(one_lm, constraints.length(2), *texts) == [False, False, True, True]


def test_predicates_read_the_text_or_the_row_too(one_lm: LanguageModel) -> None:
    assert holds(one_lm, constraints.predicate(str.islower), "ab", "!") == [True, False]
    same = constraints.predicate(lambda text, row: text == row["x"])
    assert holds(one_lm, same, "the dog", "a") == [True, False]
    assert holds(one_lm, same, "the dog", "a", row={"x": "a"}) == [False, True]
    strict = constraints.predicate(lambda text, limit=2: len(text) > limit)
    with pytest.raises(RewardError, match="called with 'abc', raised TypeError"):
        holds(one_lm, strict, "abc")


def test_a_penalty_replaces_minus_infinity(one_lm: LanguageModel) -> None:
    soft = constraints.contains("cat", penalty=4.0).bind(one_lm)
    assert soft.score_final(of_texts(one_lm, " cat", " dog")).tolist() == [0.0, -4.0]
    assert (0.5 * soft).score_final(of_texts(one_lm, " dog")).tolist() == [-2.0]


def test_a_verifier_sees_finished_texts_once(one_lm: LanguageModel, rollouts: Rollouts) -> None:
    seen: list[tuple[str, Row]] = []

    def score(texts: list[str], rows: list[Row]) -> list[float]:
        seen.extend(zip(texts, rows, strict=True))
        return [-1.0] * len(texts)

    end = constraints.verifier(score).bind(one_lm)
    scores = end.score(rollouts)
    rows = [ROWS[i] for i in rollouts.row_index]
    assert seen == [(one_lm.decode(z), r) for z, r in zip(rollouts.completions(), rows, strict=True)]
    assert scores.sum() == -len(rollouts)
    assert (scores.gather(1, rollouts.lengths[:, None]) == -1).all()
    seen.clear()
    every = constraints.verifier(score, every_prefix=True).bind(one_lm)
    assert every.score(rollouts).sum() == -rollouts.stop_mask.sum() == -len(seen)


def test_constraints_join_the_model_of_their_sum(one_lm: LanguageModel) -> None:
    target = constraints.contains("cat") + one_lm.log_prob("{z}")
    scores = target.score_final(of_texts(one_lm, " cat", " dog"))
    assert torch.isfinite(scores).tolist() == [True, False]


def test_an_unbound_constraint_says_what_to_do(rollouts: Rollouts) -> None:
    for target in (constraints.contains("a"), 2 * constraints.contains("a") + constraints.matches("a")):
        with pytest.raises(
            ConfigError, match=r"contains.* does not know the tokenizer yet: call target\.bind\(lm\)"
        ):
            target.score(rollouts)


ARGUMENT_ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: constraints.matches("[a"), ConfigError, r"regular expression '\[a': unterminated"),
    (lambda: constraints.contains(), ConfigError, "needs at least one word"),
    (lambda: constraints.contains("dog", ""), ConfigError, "needs at least one word"),
    (lambda: constraints.contains(["dog", "park"]), ConfigError, "at least one word, each as a text"),  # type: ignore[arg-type]
    (lambda: constraints.length(1) + len, RewardError, r"verifier\(fn\) is the term of a function"),  # type: ignore[operator]
    (lambda: constraints.length(3, 2), ConfigError, r"length\(3, 2\) allows nothing"),
    (lambda: constraints.length(-1), ConfigError, "allows nothing"),
    (lambda: constraints.length(1, penalty=0.0), RewardError, "positive number of nats, or None for a hard"),
    (lambda: constraints.length(1, penalty=math.inf), RewardError, "positive number of nats"),
    (lambda: constraints.length(1, penalty=math.nan), RewardError, "positive number of nats"),
    (lambda: constraints.predicate("nowhere_at_all:f"), ConfigError, "write 'package.module:function'"),
    (lambda: constraints.verifier("math:isfinite"), ConfigError, "standard library"),
    (lambda: constraints.verifier("amortlm.errors:nothing"), ConfigError, "write 'package.module:function'"),
    (lambda: constraints.verifier("math"), ConfigError, "write 'package.module:function'"),
]


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENT_ERRORS)
def test_bad_arguments_say_what_to_do(make: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_missing_columns_name_the_nearest(one_lm: LanguageModel, rollouts: Rollouts) -> None:
    with pytest.raises(TemplateError, match=r"uses \{yy\}.*did you mean 'y'\?"):
        one_lm.log_prob("{z}{yy}").score(rollouts)


def test_empty_columns_say_what_to_do(one_lm: LanguageModel) -> None:
    with pytest.raises(DataError, match="drop or fill such rows"):
        one_lm.log_prob("{z}", given="{x}").score(of_texts(one_lm, "a", row={"x": None}))


# Softened


def test_softened_takes_the_penalty_off_what_the_other_terms_say(
    one_lm: LanguageModel, rollouts: Rollouts
) -> None:
    p = one_lm.log_prob("{z}", given="{x}")
    hard = p + constraints.matches("[a-p ]*") + constraints.length(1)
    scores, plain = hard.score(rollouts), p.score(rollouts)
    soft = Softened(hard, one_lm.log_prob("{z}"), 7.0).score(rollouts)
    rejected = torch.isneginf(scores)
    assert rejected.any()
    assert (~rejected & rollouts.stop_mask).any()
    torch.testing.assert_close(soft, torch.where(rejected, plain - 7.0, scores))


def test_softened_uses_the_prior_where_no_term_is_a_density(
    one_lm: LanguageModel, rollouts: Rollouts
) -> None:
    prior = one_lm.log_prob("{z}", given="{x}")
    likelihood = one_lm.log_prob("{y}", given="{x}{z}")
    for free in (constraints.contains("a").bind(one_lm), likelihood + constraints.contains("a")):
        scores = free.score(rollouts)
        rejected = torch.isneginf(scores)
        rest = likelihood.score(rollouts) if len(free.terms) > 1 else 0.0
        expected = torch.where(rejected, prior.score(rollouts) + rest - 7.0, scores)
        torch.testing.assert_close(Softened(free, prior, 7.0).score(rollouts), expected)


# Specs


def bonus(texts: list[str], rows: list[Row]) -> list[float]:
    return [-float(len(t)) for t in texts]


def short(text: str) -> bool:
    return len(text) < 9


SPECS: dict[str, Callable[[LanguageModel], Target]] = {
    "log_prob": lambda lm: lm.log_prob("{z}{y}", given="{x}") / 0.8,
    "contrastive": lambda lm: lm.log_prob("{z}", given="{x}") - 0.5 * lm.log_prob("{y}", given="{z}"),
    "constraints": lambda lm: (
        lm.log_prob("{z}")
        + constraints.contains("a", "b", penalty=2.0)
        + constraints.matches("[a-z ]*")
        + constraints.length(1, penalty=3.0)
        + constraints.canonical(penalty=1.0)
        + constraints.allowed_tokens("a", " cat", 7, penalty=0.5)
        + constraints.predicate(short)
        + 2 * constraints.verifier(bonus, every_prefix=True)
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_gives_the_same_target(one_lm: LanguageModel, rollouts: Rollouts, name: str) -> None:
    target = SPECS[name](one_lm)
    rebuilt = target_from_spec(json.loads(json.dumps(target.to_spec())), one_lm, Trust([__name__]))
    torch.testing.assert_close(rebuilt.score(rollouts), target.score(rollouts))
    assert rebuilt.columns == target.columns
    assert rebuilt.every_prefix == target.every_prefix
    assert rebuilt.to_spec() == target.to_spec()


def test_what_cannot_be_saved_by_name_says_why() -> None:
    with pytest.raises(ConfigError, match="top level of an importable module"):
        constraints.predicate(lambda text: True).to_spec()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"logprob": {"of": "{z}"}}], "unknown target term 'logprob'; did you mean 'log_prob'"),
        ([{"contains": ["a"], "penality": 1}], "unknown target term 'penality'; did you mean 'penalty'"),
        ([{"contains": ["a"], "matches": "a"}], "names exactly one of"),
        ([{"length": {"most": 3}}], "target term 'length' with"),
        ([], "must be a list of terms"),
        ("log_prob", "must be a list of terms"),
    ],
)
def test_bad_specs_say_what_to_do(one_lm: LanguageModel, spec: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_from_spec(spec, one_lm)
