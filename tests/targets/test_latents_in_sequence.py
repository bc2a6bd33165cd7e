"""Two latents, "{z1}{z2}", against a posterior worked out by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from reference import sequence_log_prob, tiny_policy
from structured_cases import ROW, ROWS, SUPPORTS, TWO, two_latents

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
from amortlm.errors import SupportError, TemplateError
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.targets.spec import target_from_spec
from amortlm.text.template import Template


def joint_log_prob(lm: LanguageModel, row: dict, z: list[int], stops: list[int]) -> float:
    """log p(z1 SEP z2 STOP y | x) from the model, summed over the stop symbols."""
    given, after = lm.encode_start(row["x"]), lm.encode_continuation(row["y"])
    each = [sequence_log_prob(lm.model, [*given, *z, s, *after], len(given)) for s in stops]
    return torch.tensor(each, dtype=torch.float64).logsumexp(0).item()


@pytest.mark.parametrize("row", ROWS)
def test_the_posterior_of_two_latents_is_exact(family_lm: LanguageModel, row: dict) -> None:
    lm = family_lm
    for name in ("exactly two", "two stops"):
        support = SUPPORTS["exactly two"] if name == "exactly two" else Support(
            stop=(".", "!"), max_tokens=4, allowed_tokens=TWO, separator=":", min_statements=2, max_statements=2
        )  # fmt: skip
        stops = [lm.token_id(s) for s in support.stop]
        words = [lm.token_id(w) for w in TWO]
        by_hand = {}
        for n1, n2 in product(range(1, support.max_tokens), repeat=2):
            if n1 + 1 + n2 <= support.max_tokens:
                for z1, z2 in product(product(words, repeat=n1), product(words, repeat=n2)):
                    z = [*z1, lm.token_id(support.separator), *z2]
                    by_hand[tuple(z)] = joint_log_prob(lm, row, z, stops)
        found = exact.enumerate_posterior(two_latents(lm), support.bind(lm), row)
        log_r = torch.tensor([by_hand.pop(tuple(z)) for z in found.completions], dtype=torch.float64)
        assert not by_hand
        assert found.log_z == pytest.approx(log_r.logsumexp(0).item(), abs=1e-3)
        torch.testing.assert_close(found.log_p, log_r.log_softmax(0), atol=1e-3, rtol=0)


def test_latents_in_sequence_can_be_in_given_and_keep_their_spec(one_lm: LanguageModel) -> None:
    support = SUPPORTS["exactly two"].bind(one_lm)
    for numbered, plain in (
        (one_lm.log_prob("{y}", given="{x}{z1}{z2} so"), one_lm.log_prob("{y}", given="{x}{z} so")),
        (one_lm.log_prob(" a{z1}{z2}{y}", given="{x}"), one_lm.log_prob(" a{z}{y}", given="{x}")),
    ):
        assert numbered.columns == {"x", "y"}
        a, b = (exact.enumerate_posterior(t, support, ROW) for t in (numbered, plain))
        assert torch.equal(a.log_p, b.log_p)
        again = target_from_spec(numbered.to_spec(), one_lm)
        assert again.to_spec()[0]["log_prob"] == numbered.to_spec()[0]["log_prob"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{z2}{z1}", "all of them, once and in order"),
        ("{z1}{z3}", "all of them, once and in order"),
        ("{z1}{z2}{z2}", "all of them, once and in order"),
        ("{z1}{z2} and{z1}", "the text that stands between two statements"),
        ("{z}{z1}", "write {z}, the whole completion, or its statements"),
        ("{z0} {z1}", "{z0}: statements are counted from {z1}"),
        ("{z01} {z2}", "{z01}: statements are counted from {z1}"),
    ],
)
def test_latents_that_are_not_in_sequence_are_refused(text: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        Template(text)


def test_a_template_of_latents_in_sequence() -> None:
    template = Template("{x} so{z1}{z2}{z3} then {y}{{}}")
    assert template.latents == ["z1", "z2", "z3"]
    assert template.columns == {"x", "y"}
    assert template.split({"x": "a", "y": "b"}) == ("a so", " then b{}")
    assert template.around == ("{x} so", " then {y}{{}}")
    assert Template("{zone}{z}").latents == ["z"]


def test_a_policy_prompt_has_no_latents(one_lm: LanguageModel) -> None:
    with pytest.raises(TemplateError, match="take {z} out"):
        tiny_policy(one_lm, "{x}{z1}{z2}", Support(stop="."))


def test_a_support_that_does_not_fit_the_latents_is_refused(one_lm: LanguageModel, tmp_path: Path) -> None:
    target = two_latents(one_lm) + constraint.contains("cat")
    fits = tiny_policy(one_lm, "{x}", SUPPORTS["exactly two"])
    Posterior(fits, target)
    Posterior(fits, one_lm.log_prob("{z}"))
    remedy = "has 2 latents.*min_statements=2, max_statements=2"
    for support in (SUPPORTS["any number"], SUPPORTS["two or three, long"], Support(stop=".", max_tokens=5)):
        policy = tiny_policy(one_lm, "{x}", support)
        with pytest.raises(SupportError, match=remedy):
            Posterior(policy, target)
        with pytest.raises(SupportError, match=remedy):
            metropolis_hastings(policy, target, ROW, num_chains=2, num_steps=1, seed=0)
    with pytest.raises(SupportError, match=remedy):
        GFNTrainer(
            one_lm,
            target=Unordered(target, ","),
            prompt="{x}",
            support=SUPPORTS["any number"],
            train_dataset=ROWS,
            args=GFNConfig(output_dir=str(tmp_path)),
        )
