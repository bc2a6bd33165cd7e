"""`decode` shares what completions have in common, and nothing of that shows in what is drawn."""

from __future__ import annotations

import pytest
import torch
from reference import tiny_policy

from amortlm import Support
from amortlm.engine.decoding import Exploration, decode
from amortlm.engine.sampler import uniform_streams

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=4)


@pytest.mark.parametrize("hot", [False, True])
def test_completions_of_one_prompt_are_those_of_copies_of_it(family_lm, hot):
    """One prompt for 40 completions against 40 prompts for one each: same uniforms, same tokens and log q."""
    policy, n = tiny_policy(family_lm, "{x}", SUPPORT), 40
    prompts = policy.encode_rows([{"x": "the cat sat"}, {"x": "a dog"}])
    u = uniform_streams([0], [2 * n], policy.support.max_tokens + 1)
    heat = Exploration(torch.linspace(0.3, 2.0, 2 * n) if hot else None, epsilon=0.1)
    index = torch.arange(2).repeat(n)
    shared = decode(policy.passes, policy.support, policy.passes.encode(prompts), index, u, heat)
    copies = policy.passes.encode([prompts[i] for i in index.tolist()])
    apart = decode(policy.passes, policy.support, copies, torch.arange(2 * n), u, heat)
    for name in ("tokens", "lengths", "stops"):
        assert torch.equal(getattr(shared, name), getattr(apart, name)), name
    for name in ("log_pf", "log_pterm"):
        torch.testing.assert_close(getattr(shared, name), getattr(apart, name), atol=1e-5, rtol=0)
    assert len(shared.tokens.unique(dim=0)) > 10  # they do differ


def test_the_model_sees_each_prefix_once(one_lm):
    """Rows of each pass against the distinct prefixes that go on, of 64 completions of two prompts."""
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    seen = []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollouts, _ = policy.sample([{"x": "the cat"}, {"x": "a dog"}], 64, seed=0)
    rows = zip(rollouts.row_index.tolist(), rollouts.completions(), strict=True)
    completions = [(i, *z) for i, z in rows]
    width = max(map(len, completions))
    prefixes = [len({c[:t] for c in completions if len(c) >= t}) for t in range(1, width + 1)]
    assert seen[1:] == prefixes[: len(seen) - 1]  # the first pass encodes the prompts
    assert seen[1] == 2
    assert seen[2] < 128


SUPPORTS = {
    "plain": SUPPORT,
    "two stops": Support(stop=(".", ","), min_tokens=0, max_tokens=4),
    "tool": Support(
        stop=".", max_tokens=6, allowed_tokens=(" a", " cat", ":"), tool={"lookup": {"table": {"cat": "ran"}}}
    ),
}


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("mb", [None, 0])  # all at once; a pack for each prompt and completion
def test_a_watch_is_told_every_token(one_lm, monkeypatch, name, mb):
    """Its tokens are the completions, and its log q adds up to theirs; only a certain stop is not told."""
    monkeypatch.setattr(one_lm, "memory_mb", one_lm.memory_mb if mb is None else mb)
    policy = tiny_policy(one_lm, "{x}", SUPPORTS[name])
    told = [[] for _ in range(45)]

    def watch(completion, token, log_q):
        for b, *rest in zip(completion.tolist(), token.tolist(), log_q.tolist(), strict=True):
            told[b].append(rest)

    rows = [{"x": "the cat sat"}, {"x": "a dog"}, {"x": "the cat sat"}]
    rollouts, log_probs = policy.sample(rows, [20, 5, 20], seeds=[1, 2, 3], watch=watch)
    stops, whole = rollouts.stops.tolist(), rollouts.completions()
    for z, stop, said in zip(whole, stops, told, strict=True):
        assert [token for token, _ in said] in ([*z, stop], z)
        assert len(said) > len(z) or len(z) == policy.support.max_tokens
    sums = torch.tensor([sum(log_q for _, log_q in said) for said in told])
    torch.testing.assert_close(sums, log_probs.final(rollouts.lengths), atol=1e-5, rtol=0)
    unwatched, _ = policy.sample(rows, [20, 5, 20], seeds=[1, 2, 3])
    assert unwatched.completions() == whole
    for i, seed in enumerate((1, 2, 3)):  # each row has the draws of its seed
        alone, _ = policy.sample([rows[i]], (20, 5, 20)[i], seed=seed)
        assert alone.completions() == [
            z for z, n in zip(whole, rollouts.row_index.tolist(), strict=True) if n == i
        ]


def test_what_a_watch_raises_ends_the_loop(one_lm):
    policy, calls = tiny_policy(one_lm, "{x}", SUPPORT), []

    def watch(*_):
        calls.append(1)
        raise KeyError

    with pytest.raises(KeyError):
        policy.sample([{"x": "a"}], 5, watch=watch)
    assert calls == [1]
