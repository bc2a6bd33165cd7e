"""A guided law weighs each token by how likely the text then becomes a completion, under the frequencies of tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from reference import slow_log_q, tiny_policy
from structured_cases import ROW
from torch import Tensor

from amortlm import LanguageModel, Policy, Posterior, Support, exact, guided, narrow
from amortlm import constraint as c
from amortlm.engine.sampler import LocalSampler
from amortlm.errors import ConfigError
from amortlm.inference.exact import policy_log_probs
from amortlm.policy.guide import _frequencies, guided_law
from amortlm.policy.laws import check_policy, support_completions
from amortlm.rollout import wire
from amortlm.support import SupportLaw

FEW = ("a", "t", " cat", " dog", "c")
WORDS = Support(
    stop=".", min_tokens=1, max_tokens=3, allowed_tokens=FEW, pattern=r"(.*c)?at.*( dog)?|.* dog a"
)
LIST = Support(
    stop=".", separator=",", min_statements=1, max_statements=2, max_tokens=4, allowed_tokens=("a", " cat")
)


def with_constant_logits(law: SupportLaw, logits: Tensor, tokens: list[int]) -> float:
    """log q of a completion, its stop included, by steps that all have the same logits."""
    log_q, node = 0.0, torch.tensor([0])
    for t, token in enumerate([*tokens, law.stop_ids[0]]):
        step = law.step(logits[None], torch.tensor([t]), node)
        log_q += step.log_q[0, token].item() if t < law.max_tokens else 0.0
        node = law.advance(node, torch.tensor([token]))
    return log_q


@pytest.mark.parametrize(
    "support", [WORDS, replace(WORDS, min_tokens=2), LIST], ids=["pattern", "longer", "list"]
)
def test_where_context_does_not_matter_the_guided_law_is_the_posterior(
    one_lm: LanguageModel, support: Support
) -> None:
    """Of p(z stop), p a model that writes each token with the same chance everywhere; control: other frequencies."""
    law = support.bind(one_lm.codec)
    logits = torch.randn(one_lm.vocab_size, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(0)
    stop = log_p[list(law.stop_ids)].logsumexp(0).item()
    every = [z for n in range(law.min_tokens, law.max_tokens + 1) for z in law.completions(n)]
    right = torch.tensor([log_p[z].sum().item() + stop for z in every]).log_softmax(0)

    def found(guide: SupportLaw) -> Tensor:
        return torch.tensor([with_constant_logits(guide, logits, z) for z in every])

    torch.testing.assert_close(found(law.guided(log_p, stop)), right, atol=1e-4, rtol=0)
    assert (found(law) - right).abs().max() > 0.1
    assert (found(law.guided(log_p.flip(0), stop)) - right).abs().max() > 0.1


def chance(law: SupportLaw, log_token: Tensor, log_stop: float, begun: tuple[int, ...]) -> float:
    """Of the texts that begin so: how likely is a completion? By listing what may follow."""
    allowed = law.allowed.nonzero().squeeze(1).tolist()
    total = 0.0
    for more in range(law.max_tokens - len(begun) + 1):
        for rest in product(allowed, repeat=more):
            if law.contains([*begun, *rest]):
                total += math.exp(sum(log_token[t].item() for t in rest) + log_stop)
    return total


def test_the_law_is_what_it_says(one_lm: LanguageModel) -> None:
    """Each token's chance is p(token) h(after it), normalised, with h by listing and p from a plain forward pass."""
    policy = tiny_policy(one_lm, "{x}", WORDS)
    free = replace(WORDS, pattern=None)
    log_token = torch.linspace(-6, -1, one_lm.vocab_size, dtype=torch.float64)
    plain = tiny_policy(one_lm, "{x}", free)
    policy.support = policy.support.guided(log_token, -2.0)
    prompt = policy.encode_rows([ROW])[0]
    exactly = dict(zip(map(tuple, support_completions(policy)), policy_log_probs(policy, ROW), strict=True))
    for z in list(exactly)[::7]:
        log_q = 0.0
        for t, token in enumerate([*z, policy.support.stop_ids[0]]):
            if t == policy.support.max_tokens:
                break
            begun = z[:t]
            weights = {}
            for other in [*plain.support.allowed.nonzero().squeeze(1).tolist(), None]:
                text = begun if other is None else (*begun, other)
                if other is None:
                    ahead = 1.0 if policy.support.contains(list(begun)) else 0.0
                    log_p = slow_log_q(plain, prompt, [*begun, 0])[1][t]
                else:
                    ahead = chance(policy.support, log_token, -2.0, text)
                    log_p = slow_log_q(plain, prompt, [*text])[0][t]
                weights[other] = math.exp(log_p) * ahead
            log_q += math.log(weights[token if t < len(z) else None] / sum(weights.values()))
        assert exactly[z].item() == pytest.approx(log_q, abs=1e-3)


def test_sampling_and_evaluation_agree(family_lm: LanguageModel) -> None:
    for support in (WORDS, LIST):
        policy = tiny_policy(family_lm, "{x}", support)
        check_policy(guided(policy, [ROW]), [ROW])


def test_rare_words_are_found(embedded: LanguageModel) -> None:
    """The weights of the guided law are far more even than those of the law that writes what is left to write last."""
    target = embedded.log_prob("{z}", given="{x}") + c.contains("farmer", "boy")
    words = tuple(
        f" {w}"
        for w in [
            "little",
            "big",
            "brave",
            "young",
            "happy",
            "girl",
            "boy",
            "man",
            "bird",
            "bear",
            "farmer",
            "baby",
            "dog",
            "who",
            "and",
        ]
    )
    support, _ = narrow(Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=words), target, embedded)
    row = {"x": "Once upon a time there was a"}
    policy = Policy(embedded, "{x}", support)
    truth = exact.enumerate_posterior(target.bind(embedded), policy.support, row)

    def share(of: Policy) -> float:
        """Effective share of the draws, exactly."""
        log_w = truth.log_p - policy_log_probs(of, row)
        return (-(truth.log_p + log_w).logsumexp(0)).exp().item()

    assert share(guided(policy, [row])) > 100 * share(policy)


def test_frequencies_are_chances_of_the_frozen_model(one_lm: LanguageModel) -> None:
    """The mean of plain forward passes over the states of the completions; the policy's weights do not matter."""
    policy = tiny_policy(one_lm, "{x}", WORDS)
    found = _frequencies(policy, [ROW], 0)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    frozen = LocalSampler(one_lm.model, one_lm.sharing, one_lm.memory)
    rollouts, _ = policy.sample([ROW], 32, seed=("guide", 0), sampler=frozen)
    total, count = torch.zeros(one_lm.vocab_size, dtype=torch.float64), 0
    prompt = policy.encode_rows([ROW])[0]
    before = guided_law(policy, [ROW])
    with torch.no_grad():
        for z in rollouts.completions():
            states = min(len(z), policy.support.max_tokens - 1) + 1
            logits = one_lm.model(torch.tensor([[*prompt, *z]])).logits[0, len(prompt) - 1 :][:states]
            total += logits.double().softmax(-1).sum(0)
            count += states
        for p in policy.parameters():
            p += 0.05 if p.requires_grad else 0
    torch.testing.assert_close(found, total / count, atol=1e-6, rtol=1e-5)
    after = guided_law(policy, [ROW])
    assert before.automaton is not None
    assert after.automaton is not None
    assert torch.equal(before.automaton.log_h, after.automaton.log_h)  # type: ignore[arg-type]


def test_without_an_automaton_it_is_the_frozen_model(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", max_tokens=2, allowed_tokens=FEW))
    assert guided_law(policy, [ROW]) is policy.support
    frozen = Policy(one_lm, "{x}", policy.support_spec)
    torch.testing.assert_close(policy_log_probs(guided(policy, [ROW]), ROW), policy_log_probs(frozen, ROW))


def test_what_does_not_look_ahead_refuses(one_lm: LanguageModel, tmp_path: Path) -> None:
    policy = guided(tiny_policy(one_lm, "{x}", WORDS), [ROW])
    with pytest.raises(ConfigError, match=r"amortlm\.guided"):
        Posterior(policy, one_lm.log_prob("{z}", given="{x}")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ConfigError, match="look ahead"):
        wire.tables(policy.support)
