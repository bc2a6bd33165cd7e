"""The sampler protocol: the local engine obeys its law, and what breaks the law is found."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from reference import tiny_policy

from amortlm import Calculator, Support
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.errors import ConfigError
from amortlm.policy.laws import check_sampler

ROW = {"x": "the cat"}
SUPPORTS = {
    "one stop": Support(stop=".", max_tokens=3, allowed_tokens=["a", "b", "at"]),
    "two stops": Support(stop=[".", "!"], min_tokens=0, max_tokens=3, allowed_tokens=["a", "b"]),
    "list": Support(stop=".", max_tokens=5, separator=",", max_statements=2, allowed_tokens=["a", "b"]),
    "pattern": Support(stop=[".", "!"], min_tokens=0, max_tokens=4, pattern="(a|b|cat)*( ?t(t|a)?)?"),
    "too large to list": Support(stop=".", max_tokens=6),
    "tool": Support(stop=".", max_tokens=6, tool=Calculator()),
}


def local(policy):
    return LocalSampler(policy.model, policy.sharing)


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_local_engine(one_lm, name):
    policy = tiny_policy(one_lm, "{x}", SUPPORTS[name])
    before = policy.weights()
    check_sampler(local(policy), policy, ROW)
    assert all(torch.equal(w, before[k]) for k, w in policy.weights().items())


class Wrong(LocalSampler):
    """The local engine with one fault."""

    def __init__(self, policy, fault):
        super().__init__(policy.model, policy.sharing)
        self.fault, self.calls = fault, 0

    def sample(self, request):
        self.calls += 1
        hot = Exploration(torch.full((sum(request.counts),), 1.5))
        if self.fault == "says q, draws hotter" and request.exploration is None:
            request = replace(request, exploration=hot)
        if self.fault == "forgets what is kept":
            request = replace(request, kept=None)
        if self.fault == "depends on its calls":
            request = replace(request, seeds=[s + self.calls for s in request.seeds])
        if self.fault == "not greedy":
            request = replace(request, exploration=None)
        if self.fault == "one draw too few":
            request = replace(request, counts=[n - 1 for n in request.counts], exploration=None)
        draws = super().sample(request)
        if self.fault == "log q of the behaviour":
            draws = replace(draws, log_pf=draws.log_pf * 1.01)
        return draws

    def load(self, weights, version):
        super().load(weights, self.version if self.fault == "keeps its version" else version)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("says q, draws hotter", "the frequencies of 2000 draws differ from q"),
        ("log q of the behaviour", r"evaluate\(\) and the sampler differ"),
        ("forgets what is kept", "draws do not begin with the kept tokens"),
        ("not greedy", "draws at temperature 0 differ"),
        ("one draw too few", "1999 draws instead of 2000"),
        ("keeps its version", r"after load\(.., 1\) draws have version 0"),
        ("depends on its calls", "different draws alone and together with another prompt"),
    ],
)
def test_faults_are_found(one_lm, fault, message):
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    with pytest.raises(AssertionError, match=message):
        check_sampler(Wrong(policy, fault), policy, ROW)


def test_weights_that_never_arrive_are_found(one_lm):
    """A sampler with modules of its own that says the new version and draws from the old weights."""
    policy, other = (tiny_policy(one_lm, "{x}", SUPPORTS["one stop"]) for _ in range(2))
    sampler = local(other)
    sampler.load(policy.weights(), 0)
    check_sampler(sampler, policy, ROW)  # elsewhere, and right

    def lost(weights, version):
        sampler.version = version

    sampler.load = lost
    with pytest.raises(AssertionError, match=r"evaluate\(\) and the sampler differ"):
        check_sampler(sampler, policy, ROW)


@pytest.mark.parametrize("name", SUPPORTS)
def test_a_request_can_be_sent(one_lm, name):
    """It pickles without a model in it, and what comes out draws the same."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS[name])
    request = Request(policy.encode_rows([ROW]), [5], [7], policy.support)
    sent = pickle.dumps(request)
    assert len(sent) < 200_000  # the model has more than a million bytes
    a, b = (local(policy).sample(r) for r in (request, pickle.loads(sent)))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.log_q, b.log_q)


def test_weights_of_another_policy_are_refused(one_lm):
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["one stop"])
    with pytest.raises(ConfigError, match="the weights belong to another policy"):
        local(policy).load({"nothing": torch.zeros(1)}, 1)
