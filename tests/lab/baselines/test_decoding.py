"""Decoders against laws written out by hand on supports that can be enumerated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test
from torch import Tensor
from transformers import GenerationConfig

from amortlm.errors import ConfigError
from amortlm.lab.baselines.decoding import METHODS, decode, decode_counted
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.policy.laws import support_completions
from amortlm.support import Support
from amortlm.types import Rollouts

# Two stop symbols, prompts of different lengths, one of a single token.
ROWS = [{"x": "the dog ran, the"}, {"x": "a"}]
SUPPORT = Support(stop=(".", "!"), min_tokens=1, max_tokens=3, allowed_tokens=(" cat", " dog", "a", "b"))
LONG = Support(stop=".", min_tokens=2, max_tokens=9)

Warp = Callable[[Tensor], Tensor]


def keep(probs: Tensor, kept: list[int]) -> Tensor:
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


def tempered(temperature: float) -> Warp:
    return lambda p: (p ** (1 / temperature)) / (p ** (1 / temperature)).sum()


def nucleus(top_p: float) -> Warp:
    def warp(probs: Tensor) -> Tensor:
        kept, mass = [], 0.0
        for i in sorted(range(len(probs)), key=lambda i: -probs[i].item()):
            if mass >= top_p:
                break
            kept.append(i)
            mass += probs[i].item()
        return keep(probs, kept)

    return warp


def top_k(k: int) -> Warp:
    return lambda p: keep(p, sorted(range(len(p)), key=lambda i: -p[i].item())[:k])


def exact(policy: Policy, prompt: list[int], warp: Warp) -> dict[tuple[int, ...], float]:
    """Probability of every completion when each next-token law is warped, by a pass per prefix."""
    support, out = policy.support, Counter()
    alive: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while alive:
        z, mass = alive.pop()
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*prompt, *z]])).logits[0, -1].double()
        legal = [] if len(z) == support.max_tokens else support.allowed.nonzero().squeeze(1).tolist()
        legal += support.stop_ids if len(z) >= support.min_tokens else ()
        probs = warp(logits[legal].softmax(0)).tolist()
        for token, p in zip(legal, probs, strict=True):
            if p == 0:
                continue
            if token in support.stop_ids:
                out[z] += mass * p
            else:
                alive.append(((*z, token), mass * p))
    assert abs(sum(out.values()) - 1) < 1e-9
    return out


def counts(rollouts: Rollouts, row: int, completions: list[tuple[int, ...]]) -> Tensor:
    mine = zip(rollouts.completions(), rollouts.row_index.tolist(), strict=True)
    found = Counter(tuple(z) for z, n in mine if n == row)
    assert set(found) <= set(completions)
    return torch.tensor([found[z] for z in completions])


@pytest.fixture
def policy(family_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Policy:
    # What a checkpoint may bring along must not reach the decoders.
    config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, suppress_tokens=[5, 9], min_p=0.4
    )
    monkeypatch.setattr(family_lm.model, "generation_config", config)
    return tiny_policy(family_lm, "{x}", SUPPORT)


CASES: list[tuple[str, dict[str, float], Warp]] = [
    ("temperature", {}, lambda p: p),
    ("temperature", {"temperature": 0.6}, tempered(0.6)),
    ("nucleus", {"top_p": 0.7}, nucleus(0.7)),
    ("top_k", {"top_k": 3}, top_k(3)),
    ("top_k", {"top_k": 3, "temperature": 2.0}, lambda p: top_k(3)(tempered(2.0)(p))),
]


@pytest.mark.parametrize(("method", "settings", "warp"), CASES)
def test_samples_follow_the_exact_law(
    one_lm: LanguageModel, method: str, settings: dict[str, float], warp: Warp
) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    rollouts = decode(policy, ROWS, method, 2000, seed=1, **settings)
    for n, prompt in enumerate(policy.encode_rows(ROWS)):
        law = exact(policy, prompt, warp)
        observed = counts(rollouts, n, list(law))
        assert g_test(observed, torch.tensor(list(law.values()))) > LEVEL
        if settings:  # negative control: the plain policy is another law
            plain = exact(policy, prompt, lambda p: p)
            assert g_test(counts(rollouts, n, list(plain)), torch.tensor(list(plain.values()))) < LEVEL


def test_resampling_is_near_the_tempered_posterior(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    row = ROWS[:1]
    q = exact(policy, policy.encode_rows(row)[0], lambda p: p)
    plain = torch.tensor(list(q.values()))
    wanted = tempered(0.4)(plain)  # of whole completions, not of tokens
    drawn = counts(decode(policy, row, "resampling", 400, n=20, temperature=0.4), 0, list(q))
    assert g_test(drawn, wanted) > LEVEL
    assert g_test(drawn, plain) < LEVEL
    target = one_lm.log_prob("{z}", given="{x}") / 0.7
    scored = decode(policy, row, "resampling", 400, n=20, score=target)
    every = policy.rollouts(row, [list(q)])
    posterior = target.score_final(every).double().softmax(0)
    assert g_test(counts(scored, 0, list(q)), posterior) > LEVEL
    assert g_test(counts(scored, 0, list(q)), plain) < LEVEL


def test_checkpoint_generation_config_changes_nothing_and_is_kept(policy: Policy) -> None:
    config = policy.model.get_base_model().generation_config
    rollouts = decode(policy, ROWS[:1], "temperature", 1500, seed=2)
    law = exact(policy, policy.encode_rows(ROWS)[0], lambda p: p)
    assert g_test(counts(rollouts, 0, list(law)), torch.tensor(list(law.values()))) > LEVEL
    assert policy.model.get_base_model().generation_config is config


def best(policy: Policy, prompt: list[int], k: int) -> list[list[int]]:
    law = exact(policy, prompt, lambda p: p)
    return [list(z) for z in sorted(law, key=lambda z: -law[z])[:k]]


def test_wide_beams_find_the_best_completions_in_order(policy: Policy) -> None:
    size = policy.support.size()
    for method, settings in (
        ("beam", {"num_beams": size}),
        ("diverse_beam", {"num_groups": 1, "penalty": 9.0}),
    ):
        k = 10 if method == "beam" else size
        rollouts = decode(policy, ROWS, method, k, **settings)
        for n, prompt in enumerate(policy.encode_rows(ROWS)):
            found = [z for z, i in zip(rollouts.completions(), rollouts.row_index, strict=True) if i == n]
            assert found == best(policy, prompt, k)


def test_greedy_takes_the_likeliest_event_at_every_step(policy: Policy) -> None:
    rollouts = decode(policy, ROWS, "greedy", 1)
    for n, prompt in enumerate(policy.encode_rows(ROWS)):
        z: list[int] = []
        while len(z) < policy.support.max_tokens:
            after = exact(policy, prompt, lambda p: p)  # q of a first token = mass of what starts with it
            mass: Counter[int | None] = Counter()
            for other, p in after.items():
                if list(other[: len(z)]) == z:
                    mass[other[len(z)] if len(other) > len(z) else None] += p
            token = mass.most_common(1)[0][0]
            if token is None:
                break
            z.append(token)
        assert rollouts.completions()[n] == z


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_group_is_plain_beam_search(family_lm: LanguageModel, size: int) -> None:
    policy = tiny_policy(family_lm, "{x}", LONG)
    plain = decode(policy, ROWS, "beam", size)
    diverse = decode(policy, ROWS, "diverse_beam", size, num_groups=1, penalty=5.0)
    assert diverse.completions() == plain.completions()


def test_groups_without_penalty_agree_and_with_penalty_differ(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", LONG)
    same = decode(policy, ROWS[:1], "diverse_beam", 6, num_groups=3, penalty=0.0).completions()
    assert same[:2] == same[2:4] == same[4:]
    apart = decode(policy, ROWS[:1], "diverse_beam", 6, num_groups=3, penalty=50.0).completions()
    assert apart[:2] == same[:2]
    firsts = [{z[0] for z in apart[i : i + 2]} for i in (0, 2, 4)]
    assert sum(map(len, firsts)) == len(set().union(*firsts))


def test_diverse_groups_of_one_beam_by_hand(one_lm: LanguageModel) -> None:
    """Two groups, one token: the second takes the best of log q - penalty * [token of the first]."""
    support = Support(stop=".", min_tokens=1, max_tokens=1)
    policy = tiny_policy(one_lm, "{x}", support)
    law = exact(policy, policy.encode_rows(ROWS)[0], lambda p: p)
    first, second = sorted(law, key=lambda z: -law[z])[:2]
    gap = torch.tensor(law[first] / law[second]).log().item()
    for penalty, expected in ((gap * 0.9, first), (gap * 1.1, second)):
        found = decode(policy, ROWS[:1], "diverse_beam", 2, penalty=penalty).completions()
        assert found == [list(first), list(expected)]


def test_best_of_n_keeps_the_best_of_each_n(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", LONG)
    target = one_lm.log_prob("{z}")
    for score in (None, target):
        drawn = decode(policy, ROWS, "temperature", 12, seed=3)
        with torch.no_grad():
            values = (
                policy.evaluate(drawn).final(drawn.lengths) if score is None else score.score_final(drawn)
            )
        expected = [max(range(i, i + 4), key=lambda j: values[j].item()) for i in range(0, len(drawn), 4)]
        kept = decode(policy, ROWS, "best_of_n", 3, n=4, seed=3, score=score)
        assert kept.completions() == [drawn.completions()[i] for i in expected]
        assert kept.row_index.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_on_the_support(one_lm: LanguageModel, method: str) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    k = 1 if method == "greedy" else 4
    a, b = (decode_counted(policy, ROWS, method, k, seed=5) for _ in range(2))
    assert a.rollouts.row_index.tolist() == [0] * k + [1] * k
    assert all(z in support_completions(policy) for z in a.rollouts.completions())
    assert a.rollouts.completions() == b.rollouts.completions()
    longest = 3 + 1
    n = METHODS[method].get("n", 1)
    assert 2 * k * n <= a.token_passes <= 2 * k * n * longest
    assert torch.isfinite(one_lm.log_prob("{z}", given="{x}").score_final(a.rollouts)).all()


def test_sampling_leaves_the_global_generator_alone(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    decode(policy, ROWS, "temperature", 4)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("method", "k", "settings", "words"),
    [
        ("beams", 4, {}, "did you mean 'beam'"),
        ("nucleus", 4, {"topp": 0.5}, "no setting 'topp'"),
        ("greedy", 4, {}, "greedy cannot give 4"),
        ("temperature", 4, {"temperature": 0.0}, "use 'greedy'"),
        ("resampling", 4, {"temperature": float("nan")}, "need temperature > 0"),
        ("temperature", 4, {"temperature": float("inf")}, "need temperature > 0"),
        ("nucleus", 4, {"top_p": 0.0}, "top_p"),
        ("top_k", 4, {"top_k": 0}, "at least 1"),
        ("beam", 4, {"num_beams": 2}, "cannot give 4"),
        ("diverse_beam", 4, {"num_groups": 3}, "must divide"),
        ("beam", 100, {}, "too few completions"),
        ("diverse_beam", 100, {"num_groups": 1}, "too few completions"),
    ],
)
def test_errors_name_the_remedy(
    one_lm: LanguageModel, method: str, k: int, settings: dict[str, float], words: str
) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    with pytest.raises(ConfigError, match=words):
        decode(policy, ROWS, method, k, **settings)
