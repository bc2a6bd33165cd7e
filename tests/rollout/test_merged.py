"""Policies whose whole weights are sent: the server's own code on a stand-in for vLLM, which has one set of weights at a
time, and a cache of prefixes that outlives them unless it is reset."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest
import torch
from amortlm_vllm.turns import Turns
from fake_vllm import serving
from peft import IA3Config, LoraConfig
from reference import tiny_policy
from safetensors.torch import save

from amortlm import Policy, Support
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.errors import ConfigError, RolloutError
from amortlm.policy.laws import check_sampler
from amortlm.rollout import HTTPSampler
from amortlm.rollout.connection import Patience

ROW = {"x": "the cat"}
WORDS = Support(stop=".", max_tokens=3, allowed_tokens=["a", "b", "at"])
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
# What a server of adapters refuses, and a plain LoRA.
ADAPTERS = {
    "plain": LoraConfig(**LORA),
    "full": "full",
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ranks": LoraConfig(**LORA | {"target_modules": ["q_proj", "o_proj"]}, rank_pattern={"q_proj": 3}),
    "saved": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "head": LoraConfig(**LORA | {"target_modules": ["lm_head"]}),
    "embeddings": LoraConfig(**LORA | {"target_modules": ["embed_tokens"]}),
}
QUICK = Patience(request=60, outage=0.3, pause=0.05)


def policy_of(lm, adapter, support=WORDS, seed=1):
    """Far from the model."""
    policy = Policy(lm, "{x}", support, adapter)
    generator = torch.Generator().manual_seed(seed)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


def moved(policy, by=0.1):
    generator = torch.Generator().manual_seed(5)
    return {k: w + by * torch.randn(w.shape, generator=generator) for k, w in policy.weights().items()}


def asked(policy, count=6, seed=7):
    return Request(policy.encode_rows([ROW]), [count], [seed], policy.support)


def local(policy):
    return LocalSampler(policy.model, policy.sharing)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.allclose(a.log_q, b.log_q, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_obeys_the_law_of_samplers(one_lm, adapter, tmp_path):
    policy = policy_of(one_lm, ADAPTERS[adapter])
    with serving(policy, tmp_path, merged=True) as (url, engine):
        check_sampler(HTTPSampler(url, policy, patience=QUICK), policy, ROW, num_samples=300)
        assert engine.loads >= 2, "control: the law loads other weights"
        assert len(list(tmp_path.glob("merged-*"))) <= 2, "older files are gone"
        assert list(tmp_path.glob("*.part")) == []


def test_models_without_lora_draw_what_the_local_engine_draws(models, tmp_path):
    """GPT-2, of which vLLM has no LoRA, and whose embeddings are its head."""
    lm = models["gpt2-tied"]
    policy = tiny_policy(lm, "{x}", Support(stop=[".", "!"], min_tokens=2, max_tokens=4))
    prompts = policy.encode_rows([ROW, {"x": "a"}])
    hot = Exploration(torch.linspace(0, 2, 8), 0.2)
    kept = [[], [2], [2, 3], [3], [], [], [2], [3, 3, 2]]
    with serving(policy, tmp_path, merged=True) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        for settings in ({}, {"exploration": hot, "kept": kept}):
            request = Request(prompts, [3, 5], [1, 2], policy.support, **settings)
            assert same(sampler.sample(request), local(policy).sample(request))


def test_each_load_is_checked(one_lm, tmp_path):
    """Weights that are lost, and a cache of other weights that is kept, are found before anything is drawn."""
    policy = policy_of(one_lm, "full")
    with serving(policy, tmp_path, merged=True) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        sampler.load(moved(policy), 1)
        engine.forgetful = False
        with pytest.raises(RolloutError, match="draws from other weights or another model"):
            sampler.load(moved(policy, 0.2), 2)
        engine.forgetful, engine.lost = True, True
        with pytest.raises(RolloutError, match="draws from other weights or another model"):
            sampler.load(moved(policy, 0.3), 3)
        engine.lost = False
        sampler.load(policy.weights(), 4)
        assert same(sampler.sample(asked(policy)), local(policy).sample(asked(policy)))


def test_a_server_without_the_weights_is_found(one_lm, tmp_path):
    policy = policy_of(one_lm, "full")
    with serving(policy, tmp_path, merged=True) as (url, engine):
        engine.lost = True
        with pytest.raises(RolloutError, match="draws from its model without the weights"):
            HTTPSampler(url, policy, patience=QUICK)


def test_versions_take_turns(one_lm, tmp_path):
    """What was asked for before weights changed is drawn from the old ones, to the end, and nothing from both: the
    stand-in fails if weights change under a text."""
    policy = policy_of(one_lm, "full")
    requests = [asked(policy, seed=seed) for seed in range(6)]
    old = [local(policy).sample(request) for request in requests]
    with serving(policy, tmp_path, merged=True) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        for request in requests[:4]:
            sampler.ask(request, due=1)
        new = moved(policy)
        sampler.send(new, 1)
        for request in requests[4:]:
            sampler.ask(request, due=2)
        drawn = [sampler.sample(request) for request in requests]
        sampler.check()
        assert [d.version for d in drawn] == [0] * 4 + [1] * 2
        assert all(same(a, b) for a, b in zip(drawn[:4], old[:4], strict=True))
        for own, p in policy.model.named_parameters():
            p.data.copy_(new[own])
        again = [local(policy).sample(request) for request in requests[4:]]
        assert all(same(a, b) for a, b in zip(drawn[4:], again, strict=True))
        assert not any(same(a, b) for a, b in zip(drawn[4:], old[4:], strict=True)), "control"
        assert engine.loads >= 2


def test_two_trainings_on_one_server_draw_from_their_own_weights(one_lm, tmp_path):
    policies = [policy_of(one_lm, ADAPTERS["dora"], seed=seed) for seed in (1, 2)]
    with serving(policies[0], tmp_path, merged=True) as (url, engine):
        samplers = [HTTPSampler(url, policy, patience=QUICK) for policy in policies]
        for _ in range(2):
            for policy, sampler in zip(policies, samplers, strict=True):
                assert same(sampler.sample(asked(policy)), local(policy).sample(asked(policy)))
        assert engine.loads == 6, "one for each check, and one for each draw: the other's are there"


def test_a_server_that_was_started_again_gets_everything_again(one_lm, tmp_path):
    policy = policy_of(one_lm, "full")
    with serving(policy, tmp_path / "one", merged=True) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
    with serving(policy, tmp_path / "two", merged=True) as (url, engine):
        sampler._fleet.servers[0].connection.__init__(url, QUICK)  # the same server, elsewhere
        assert same(sampler.sample(asked(policy)), local(policy).sample(asked(policy)))
        assert engine.loads == 1


def test_servers_take_one_form_of_weights(one_lm, tmp_path):
    policy = policy_of(one_lm, ADAPTERS["plain"])
    with ExitStack() as stack:
        urls = [
            stack.enter_context(serving(policy, tmp_path / str(merged), merged=merged))[0]
            for merged in (True, False)
        ]
        with pytest.raises(ConfigError, match="different forms: start all with the same --weights"):
            HTTPSampler(urls, policy, patience=QUICK)
        samplers = [HTTPSampler(url, policy, patience=QUICK) for url in urls]
        servers = [sampler._fleet.servers[0] for sampler in samplers]
        # Each is started again as the other.
        servers[0].connection, servers[1].connection = servers[1].connection, servers[0].connection
        for sampler, server in zip(samplers, servers, strict=True):
            server._given = set()
            with pytest.raises(ConfigError, match="this server takes .*: start the training again"):
                sampler.sample(asked(policy))


@pytest.mark.parametrize(
    ("data", "named", "message"),
    [
        (b"garbage", True, "these are not weights"),
        (save({"x": torch.zeros(1)}), False, "not the hash of the bytes"),
    ],
)
def test_damaged_weights_are_refused(one_lm, tmp_path, data, named, message):
    policy = policy_of(one_lm, "full")
    with serving(policy, tmp_path, merged=True) as (url, _):
        name = hashlib.sha256(data if named else b"other").hexdigest()
        request = urllib.request.Request(f"{url}/weights/{name}", data, method="PUT")
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(request)
        assert found.value.code == 400
        assert message in found.value.read().decode()
        assert list(tmp_path.glob("*")) == []


def test_weights_of_another_model_are_refused(one_lm, models, tmp_path):
    policy, other = policy_of(one_lm, "full"), policy_of(models["gpt2-untied"], "full")
    with (
        serving(other, tmp_path, merged=True) as (url, _),
        pytest.raises(ConfigError, match="vLLM cannot load these weights"),
    ):
        HTTPSampler(url, policy, patience=QUICK)


def taking_turns(users):
    """What happens when users, each (name, work), take their turns: names that began, and who was inside together."""
    began, inside, seen = [], [], []

    async def begin(name):
        began.append(name)
        assert not inside, "others are inside"
        await asyncio.sleep(0.01)
        if name == "wrong":
            raise ValueError("wrong")

    async def use(turns, name, seconds):
        async with turns.of(name):
            inside.append(name)
            await asyncio.sleep(seconds)
            seen.append(tuple(inside))
            inside.remove(name)

    async def all_of_them():
        turns = Turns(begin)
        tasks = [asyncio.ensure_future(use(turns, *user)) for user in users]
        await asyncio.sleep(0.005)
        for task, (name, _) in zip(tasks, users, strict=True):
            if name == "cancelled":
                task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return began, seen, asyncio.run(asyncio.wait_for(all_of_them(), 10))


def test_turns():
    began, seen, results = taking_turns(
        [("a", 0.05), ("b", 0.01), ("a", 0.02), ("c", 0.01), ("b", 0.01), ("cancelled", 0.01)]
    )
    assert began == ["a", "b", "c"]
    assert all(len(set(names)) == 1 for names in seen), "never two together"
    assert max(map(len, seen)) == 2, "control: those of one name are inside together"
    assert results[:5] == [None] * 5
    assert isinstance(results[5], asyncio.CancelledError)


def test_a_turn_that_cannot_begin_leaves_the_others_theirs():
    began, seen, results = taking_turns([("wrong", 0), ("a", 0), ("wrong", 0), ("b", 0)])
    assert sorted(began) == ["a", "b", "wrong", "wrong"]
    assert sorted(seen) == [("a",), ("b",)]
    assert [type(x) for x in results] == [ValueError, type(None), ValueError, type(None)]
