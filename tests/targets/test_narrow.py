"""Hard constraints in the support: the posterior of the narrower support is that of the target on the wider one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from structured_cases import ROW

from amortlm import (
    GFNConfig,
    GFNTrainer,
    LanguageModel,
    Posterior,
    Support,
    Target,
    constraint,
    exact,
    narrow,
)
from amortlm.errors import DataError, SupportError
from amortlm.support import token_tables

FEW = ("a", "t", " a", " cat", " dog", " ", "c")
FREE = Support(stop=".", min_tokens=0, max_tokens=4, allowed_tokens=FEW)
CONSTRAINTS = {
    "a word": constraint.contains("cat"),
    "two words": constraint.contains("cat", "dog"),
    "letter case": constraint.contains("CAT"),
    "a sign of expressions": constraint.contains("a") + constraint.matches(r"[^t]*"),
    "an expression": constraint.matches("a( cat)*"),
    "two expressions": constraint.matches("a.*") + constraint.matches(".*(dog|t)"),
    "tokens": constraint.allowed_tokens("a", " cat", " the"),
    "a length": constraint.length(2, 3),
    "a least length": constraint.length(3),
    "all kinds": constraint.contains("a")
    + constraint.length(1, 3)
    + constraint.allowed_tokens("a", " a", " dog"),
    "weighted": 0.5 * constraint.contains("cat"),
}


def law_of(target: Target, support: Support, lm: LanguageModel) -> tuple[dict[tuple[int, ...], float], float]:
    """(log p of every completion with R > 0, log Z)."""
    truth = exact.enumerate_posterior(target.bind(lm), support.bind(lm), ROW)
    log_p = zip(map(tuple, truth.completions), truth.log_p.tolist(), strict=True)
    return {z: value for z, value in log_p if value > -1e9}, truth.log_z


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_posterior_is_the_same(family_lm: LanguageModel, name: str) -> None:
    target = family_lm.log_prob("{z}{y}", given="{x}") + CONSTRAINTS[name]
    support, said = narrow(FREE, target, family_lm)
    assert len(said) == len(target.terms) - 1
    assert all("holds only what satisfies" in sentence for sentence in said)
    (wide, log_z), (held, narrowed) = law_of(target, FREE, family_lm), law_of(target, support, family_lm)
    assert held == pytest.approx(wide, abs=1e-5)
    assert narrowed == pytest.approx(log_z, abs=1e-5)
    law = support.bind(family_lm)
    assert law.size() == len(held), "nothing else is left"
    assert law.size() < FREE.bind(family_lm).size()


def test_another_constraint_is_another_posterior(one_lm: LanguageModel) -> None:
    """Negative control: the support of "dog" is not that of "cat"."""
    p = one_lm.log_prob("{z}{y}", given="{x}")
    support, _ = narrow(FREE, p + constraint.contains("dog"), one_lm)
    assert (
        law_of(p, support, one_lm)[0].keys() != law_of(p + constraint.contains("cat"), FREE, one_lm)[0].keys()
    )


def test_what_a_support_states_already_is_kept(one_lm: LanguageModel) -> None:
    support = Support(
        stop=".", min_tokens=2, max_tokens=4, allowed_tokens=FEW, pattern="a.*", banned_tokens=["c"]
    )
    target = one_lm.log_prob("{z}{y}", given="{x}") + constraint.contains("cat") + constraint.length(1, 3)
    found, _ = narrow(support, target, one_lm)
    assert (found.min_tokens, found.max_tokens, found.patterns[0]) == (2, 3, "a.*")
    assert law_of(target, found, one_lm)[0] == pytest.approx(law_of(target, support, one_lm)[0], abs=1e-5)
    assert narrow(found, target, one_lm)[0] == found, "and once is enough"


@pytest.mark.parametrize(
    ("term", "support", "why"),
    [
        (constraint.contains(" cat"), FREE, "a support cannot state it"),
        (constraint.matches(r"a\b.*"), FREE, "a support cannot state it"),
        (constraint.predicate(str.islower), FREE, "a support cannot state it"),
        (constraint.canonical(), FREE, "a support cannot state it"),
        (
            constraint.contains("1"),
            Support(stop=".", tool="calculator"),
            "a tool writes into the completions",
        ),
        (constraint.contains("a"), Support(stop=".", separator="!"), "a support cannot state it"),
        (constraint.allowed_tokens("a"), Support(stop=".", separator="!"), "a support cannot state it"),
    ],
)
def test_what_a_support_cannot_say_stays_a_term(
    embedded: LanguageModel, term: Target, support: Support, why: str
) -> None:
    if support is FREE:
        support = Support(stop=".", max_tokens=4)
    found, [said] = narrow(support, embedded.log_prob("{z}", given="{x}") + term, embedded)
    assert found == support
    assert said.endswith(f"stays a term of the target alone: {why}")


def test_only_the_empty_completion_is_no_support(one_lm: LanguageModel) -> None:
    found, [said] = narrow(FREE, one_lm.log_prob("{z}", given="{x}") + constraint.length(0, 0), one_lm)
    assert found == FREE
    assert said.endswith("a support cannot state it")


def test_a_support_that_leaves_out_parts_of_characters_is_not_narrowed(embedded: LanguageModel) -> None:
    """With all tokens the tables of its pattern are too large for them; with few they would come back."""
    quoted = embedded.encode_continuation(" “a”")
    support = Support(stop="</s>", max_tokens=8, pattern=r"“a”|.*\w.{8}")
    assert not support.bind(embedded).contains(quoted)
    few = embedded.log_prob("{z}", given="{x}") + constraint.allowed_tokens(*quoted)
    found, [said] = narrow(support, few, embedded)
    assert found == support
    assert "which is too much" in said


def test_nor_by_a_pattern_that_would_make_its_tables_small(
    embedded: LanguageModel, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(token_tables, "MAX_CELLS", 300_000)
    support = Support(stop="</s>", max_tokens=8, pattern=r"“a”|.*[aeiou].{6}")
    target = embedded.log_prob("{z}", given="{x}") + constraint.matches("“a”")
    assert not support.bind(embedded).contains(embedded.encode_continuation("“a”"))
    assert narrow(support, target, embedded)[0] == support


def test_mistakes_in_a_constraint_keep_their_message(embedded: LanguageModel) -> None:
    target = embedded.log_prob("{z}", given="{x}") + constraint.allowed_tokens("zz")
    with pytest.raises(SupportError, match="in this support: 'zz' is 2 tokens"):
        narrow(Support(stop="."), target, embedded)


def test_gold_that_violates_a_constraint_is_refused(one_lm: LanguageModel, tmp_path) -> None:
    with pytest.raises(DataError, match="hard constraints of a target are taken into the support, unless"):
        make_trainer(one_lm, tmp_path, gold=[[" cat"]])
    make_trainer(one_lm, tmp_path, gold=[[" cat"]], narrow_support=False)


def test_a_list_can_be_narrowed_by_its_length(one_lm: LanguageModel) -> None:
    support = Support(stop=".", max_tokens=5, allowed_tokens=("a", "t"), separator=" ")
    target = one_lm.log_prob("{z}{y}", given="{x}") + constraint.length(2, 3)
    found, _ = narrow(support, target, one_lm)
    assert law_of(target, found, one_lm)[0] == pytest.approx(law_of(target, support, one_lm)[0], abs=1e-5)


def test_soft_constraints_stay(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}", given="{x}") - constraint.contains("cat", penalty=3.0)
    assert narrow(FREE, target, one_lm) == (FREE, [])


def test_what_is_too_large_stays_a_term(embedded: LanguageModel, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(token_tables, "MAX_CELLS", 20_000)
    target = embedded.log_prob("{z}", given="{x}") + constraint.contains("boy") + constraint.length(3)
    support, [first, second] = narrow(Support(stop="."), target, embedded)
    assert "stays a term of the target alone" in first
    assert "which is too much" in first
    assert support == Support(stop=".", min_tokens=3)
    assert "holds only" in second


@pytest.mark.parametrize(
    "term",
    [
        constraint.length(5),
        constraint.allowed_tokens(" the"),
        constraint.matches("x+"),
        constraint.contains("ate"),
    ],
)
def test_what_nothing_satisfies_is_an_error(one_lm: LanguageModel, term: Target) -> None:
    with pytest.raises(SupportError, match="in this support: .*(allows nothing|matches)"):
        narrow(
            Support(stop=".", max_tokens=4, allowed_tokens=FEW),
            one_lm.log_prob("{z}", given="{x}") + term,
            one_lm,
        )


def test_characters_in_parts_are_kept(embedded: LanguageModel) -> None:
    """A text whose quotation marks are two tokens each, parts of a character alone, is in the narrower support."""
    target = embedded.log_prob("{z}", given="{x}") + constraint.contains("dog")
    support, _ = narrow(Support(stop="</s>", max_tokens=12), target, embedded)
    law = support.bind(embedded)
    assert law.contains(embedded.encode_continuation(" “the dog” é"))
    assert not law.contains(embedded.encode_continuation(" “the cat” é"))
    half = embedded.encode_continuation(" dog”")[:-1]
    assert "\ufffd" in embedded.decode(half)
    assert law.contains(half), "as the constraint has it"


def make_trainer(lm: LanguageModel, folder, gold=None, **settings) -> GFNTrainer:
    return GFNTrainer(
        lm,
        target=lm.log_prob("{z}{y}", given="{x}") + constraint.contains("cat", "dog"),
        prompt="{x}",
        support=FREE,
        train_dataset=[ROW],
        args=GFNConfig(
            output_dir=str(folder), use_cpu=True, diagnose_steps=0, max_steps=4, save_steps=2, **settings
        ),
        adapter=4,
        gold=gold,
    )


def test_a_trainer_narrows_the_support(one_lm: LanguageModel, tmp_path, caplog) -> None:
    lm = one_lm
    caplog.set_level("INFO", "amortlm")
    trainer = make_trainer(lm, tmp_path / "run")
    said = "the support holds only what satisfies contains(['cat', 'dog'])"
    assert trainer.chosen[0] == said
    assert said in caplog.text
    trainer.train()
    texts = {sample.text for sample in trainer.posterior.sample(ROW, 50, seed=1)}
    assert all("cat" in text and "dog" in text for text in texts)
    again = Posterior.from_pretrained(tmp_path / "run", lm=lm)
    assert again.policy.support_spec.to_dict() == trainer.policy.support_spec.to_dict()
    assert {sample.text for sample in again.sample(ROW, 50, seed=1)} == texts
    resumed = make_trainer(lm, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in trainer.policy.weights().items():
        assert torch.equal(weight, resumed.policy.weights()[name]), name


def test_it_can_be_switched_off(one_lm: LanguageModel, tmp_path) -> None:
    trainer = make_trainer(one_lm, tmp_path, narrow_support=False)
    assert trainer.policy.support_spec == FREE
    assert not any("support" in sentence for sentence in trainer.chosen)


def test_every_text_of_three_tokens_is_judged_alike(one_lm: LanguageModel) -> None:
    """`contains` as its pattern, on signs of regular expressions, letter case and edges of words."""
    words = ["a", "t", "c", " ", "\n", " cat", ".", "A"]
    ids = [one_lm.token_id(w) for w in words if len(one_lm.encode_continuation(w)) == 1]
    strings = [list(z) for n in range(4) for z in product(ids, repeat=n)]
    for word in ("a", "at", "A", "cat", "t c", "c.", "."):
        term = constraint.contains(word)
        support = Support(stop="!", min_tokens=0, max_tokens=3, allowed_tokens=ids)
        law = narrow(support, one_lm.log_prob("{z}", given="{x}") + term, one_lm)[0].bind(one_lm)
        expected = [term.accepts(one_lm.decode(z), ROW) for z in strings]
        assert [law.contains(z) for z in strings] == expected, word
        assert 0 < sum(expected) < len(strings)
