"""The sampler that asks a server: the server's own code on a stand-in for vLLM, and servers with faults."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from drawn_supports import SUPPORTS
from fake_vllm import serving
from peft import IA3Config, LoraConfig
from reference import tiny_policy
from safetensors.torch import load, save

from amortlm import Policy
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import LocalSampler
from amortlm.engine.sampler import Request as Asked
from amortlm.errors import ConfigError, RolloutError
from amortlm.policy.laws import check_sampler
from amortlm.rollout import HTTPSampler
from amortlm.rollout.ahead import key_of
from amortlm.rollout.connection import Connection, Patience

ROW = {"x": "the cat"}
QUICK = Patience(request=60, outage=0.3, pause=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTS)
def test_it_obeys_the_law_of_samplers(one_lm, name, tmp_path):
    policy, theirs = (tiny_policy(one_lm, "{x}", SUPPORTS[name]) for _ in range(2))
    with serving(theirs, tmp_path) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=Patience(request=100))
        check_sampler(sampler, policy, ROW, num_samples=50 if name == "too large to list" else 500)
        assert sampler.reproducible
        assert engine.interruptions > 20, "control: requests were interrupted"
        assert len(engine.adapters) == 2, "older ones were unloaded"


def test_it_draws_what_the_local_engine_draws(one_lm, tmp_path):
    policy, theirs = (tiny_policy(one_lm, "{x}", SUPPORTS["two stops"]) for _ in range(2))
    prompts = policy.encode_rows([ROW, {"x": "a"}])
    hot = Exploration(torch.linspace(0, 2, 8), 0.2)
    kept = [[], [2], [2, 3], [3], [], [], [2], [3, 3, 2]]
    more = ({}, {"exploration": hot}, {"exploration": hot, "kept": kept})
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        for settings in more:
            asked = Asked(prompts, [3, 5], [1, 2], policy.support, **settings)
            a, b = LocalSampler(policy.model, policy.sharing).sample(asked), sampler.sample(asked)
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


@pytest.fixture
def pair(one_lm):
    """Two equal policies: the trainer's, and the one that the server draws from."""
    return [tiny_policy(one_lm, "{x}", SUPPORTS["one stop"]) for _ in range(2)]


def asked(policy, count=4):
    return Asked(policy.encode_rows([ROW]), [count], [7], policy.support)


# Delivery


def moved(policy, by=0.1):
    generator = torch.Generator().manual_seed(5)
    return {k: w + by * torch.randn(w.shape, generator=generator) for k, w in policy.weights().items()}


def test_each_load_is_checked(pair, tmp_path):
    policy, theirs = pair
    before = policy.weights()
    with serving(theirs, tmp_path) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        sampler.load(moved(policy), 1)  # weights that the policy itself has not: it gets its own back
        assert all(torch.equal(w, before[k]) for k, w in policy.weights().items())
        engine.lost = True
        with pytest.raises(RolloutError, match="draws from its model without the weights"):
            sampler.load(moved(policy, 0.2), 2)


def test_weights_that_change_hardly_anything_are_no_reason_to_complain(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        for scale in (0.0, 1e-6):
            small = {k: w * scale if "lora_B" in k else w for k, w in policy.weights().items()}
            sampler.load(small, 1)


@pytest.mark.parametrize("wrong", ["another model", "other weights"])
def test_what_draws_from_something_else_is_found(models, one_lm, wrong, pair, tmp_path):
    policy, theirs = pair
    if wrong == "another model":
        with torch.no_grad():
            lm = type(one_lm)(__import__("copy").deepcopy(one_lm.model), one_lm.tokenizer, name="other")
            next(p for n, p in lm.model.named_parameters() if "embed" in n).mul_(1.1)
        theirs = tiny_policy(lm, "{x}", SUPPORTS["one stop"])
    with serving(theirs, tmp_path) as (url, engine):
        if wrong == "other weights":
            plain = engine.add_lora

            async def stale(request):
                done = await plain(request)
                engine.adapters[request.lora_int_id] = moved(policy)
                return done

            engine.add_lora = stale
        with pytest.raises(RolloutError, match="draws from other weights or another model.*nats"):
            HTTPSampler(url, policy, patience=QUICK)


def test_weights_of_another_policy_are_refused(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        with pytest.raises(ConfigError, match="the weights belong to another policy"):
            sampler.load({"nothing": torch.zeros(1)}, 1)


LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("full", "loads LoRA alone, not a full copy: start it with --weights merged, train LoRA"),
        (IA3Config(task_type="CAUSAL_LM"), "loads LoRA alone, not a IA3 adapter"),
        (LoraConfig(**LORA, use_dora=True), "cannot load LoRA with use_dora: start it with --weights merged"),
        (LoraConfig(**LORA, rank_pattern={"q_proj": 3}), "cannot load LoRA with rank_pattern"),
        (LoraConfig(**LORA, alpha_pattern={"q_proj": 3}), "cannot load LoRA with alpha_pattern"),
        (LoraConfig(**LORA, modules_to_save=["lm_head"]), "cannot load LoRA with modules_to_save"),
        (LoraConfig(**LORA, init_lora_weights="pissa"), "cannot load LoRA with init_lora_weights='pissa'"),
        (LoraConfig(**LORA | {"target_modules": ["lm_head"]}), "inside the model alone, not .*lm_head"),
        (LoraConfig(**LORA | {"target_modules": ["embed_tokens"]}), "inside the model alone, not .*embed"),
        (LoraConfig(**LORA | {"r": 17}), "vLLM cannot load these weights: LoRA rank 17 is greater than"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_the_server_cannot_load_is_refused(one_lm, pair, tmp_path, adapter, message):
    policy = Policy(one_lm, "{x}", SUPPORTS["one stop"], adapter)
    with serving(pair[1], tmp_path) as (url, _), pytest.raises(ConfigError, match=message):
        HTTPSampler(url, policy, patience=QUICK)


# A server that forgets, refuses or fails


def test_a_server_that_was_started_again_gets_everything_again(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path / "one") as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        before = sampler.sample(asked(policy))
    with serving(theirs, tmp_path / "two") as (url, engine):
        sampler._fleet.servers[0].connection = Connection(url, QUICK)  # the same address, elsewhere
        again = sampler.sample(asked(policy))
        assert torch.equal(before.tokens, again.tokens)
        assert len(engine.adapters) == 1


def test_adapters_that_others_push_out_come_back(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, engine):
        first = HTTPSampler(url, policy, patience=QUICK)
        before = first.sample(asked(policy))
        second = HTTPSampler(url, policy, patience=QUICK)
        for version in (1, 2):
            second.load(moved(policy, 0.1 * version), version)
        assert torch.equal(before.tokens, first.sample(asked(policy)).tokens)
        assert len(engine.adapters) == 2


def test_a_key_is_needed(pair, tmp_path, monkeypatch):
    policy, theirs = pair
    with serving(theirs, tmp_path, key="secret") as (url, _):
        with pytest.raises(ConfigError, match="wants a key: set the environment variable AMORTLM_API_KEY"):
            HTTPSampler(url, policy, patience=QUICK)
        monkeypatch.setenv("AMORTLM_API_KEY", "secret")
        assert len(HTTPSampler(url, policy, patience=QUICK).sample(asked(policy))) == 4


def test_a_prompt_that_does_not_fit_is_refused(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path, max_model_len=20) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        long = Asked([[5] * 17], [1], [0], policy.support)
        with pytest.raises(ConfigError, match="has 21 tokens, and the server room for 20.*--max-model-len"):
            sampler.sample(long)


@pytest.mark.parametrize("kept", [[48], [-1], [2, 2, 2, 2]])
def test_kept_tokens_that_cannot_be_are_refused(pair, tmp_path, kept):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        with pytest.raises(ConfigError, match="kept tokens that are not of the model, or more"):
            sampler.sample(Asked([[5]], [1], [0], policy.support, kept=[kept]))


def test_a_model_of_other_tokens_is_refused(one_lm, pair, tmp_path):
    policy, theirs = pair
    theirs.lm = SimpleNamespace(vocab_size=50, model=one_lm.model)
    message = "the server's model, tiny, has 50 tokens, that of the policy 48"
    with serving(theirs, tmp_path) as (url, _), pytest.raises(ConfigError, match=message):
        HTTPSampler(url, policy, patience=QUICK)


@contextmanager
def answering(answer):
    """The address of a server that does with each connection what `answer` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def hangs_up(connection):
    connection.recv(10)


def speaks_something_else(connection):
    connection.recv(10_000)
    connection.sendall(b"220 mail ready\r\n")


def dribbles(connection):
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" ")
        time.sleep(0.05)


def says_nothing(connection):
    connection.recv(10_000)
    time.sleep(5)


def breaks_off(connection):
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}")


def is_a_web_page(connection):
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")


def fails(connection):
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 21\r\n\r\nInternal Server Error")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (hangs_up, "cannot be reached, or breaks off .*start it again"),
        (speaks_something_else, "cannot be reached, or breaks off .*BadStatusLine"),
        (breaks_off, "cannot be reached, or breaks off .*IncompleteRead"),
        (dribbles, "has not answered GET /info in 0.3 s: ask for fewer"),
        (says_nothing, "has not answered GET /info in 0.3 s"),
        (is_a_web_page, "does not answer like a server of completions: start one as docs/scale.md says"),
        (fails, "answers GET /info with status 500: Internal Server Error"),
    ],
)
def test_servers_that_fail(pair, answer, message):
    patience = Patience(request=0.3, outage=0.3, pause=0.05)
    with answering(answer) as url, pytest.raises(RolloutError, match=message):
        HTTPSampler(url, pair[0], patience=patience)


def test_a_server_that_is_not_there(pair):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(RolloutError, match="ConnectionRefusedError.*tried for 0.3 s"):
        HTTPSampler(url, pair[0], patience=QUICK)
    with pytest.raises(ConfigError, match="is not the address of a server"):
        HTTPSampler("127.0.0.1:8000", pair[0])


def test_a_server_that_comes_back_in_time(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        connection = sampler._fleet.servers[0].connection
        sample, calls = connection._once, []

        def fails_twice(*call):
            calls.append(call)
            if len(calls) <= 2:
                raise ConnectionResetError
            return sample(*call)

        connection._once = fails_twice
        assert len(sampler.sample(asked(policy))) == 4
        assert len(calls) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"garbage", "does not hold draws"),
        (lambda d: save({"tokens": d["tokens"]}), "does not hold draws"),
        (lambda d: save(d | {"lengths": d["lengths"][:2]}), "holds lengths of shape"),
        (lambda d: save(d | {"lengths": d["lengths"] + 9}), "tokens outside the support"),
        (lambda d: save(d | {"tokens": d["tokens"] + 20}), "tokens outside the support"),
        (lambda d: save(d | {"stops": d["stops"] + 1}), "tokens outside the support"),
        (lambda d: save(d | {"log_pf": d["log_pf"] * float("nan")}), "tokens outside the support"),
    ],
)
def test_answers_that_are_no_draws(pair, tmp_path, change, message):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        connection = sampler._fleet.servers[0].connection
        call = connection.call

        def wrong(method, path, body=b""):
            data = call(method, path, body)
            return change(load(data)) if path == "/draw" else data

        connection.call = wrong
        with pytest.raises(RolloutError, match=message):
            sampler.sample(asked(policy))


@pytest.mark.parametrize("name", ["one stop", "two stops", "pattern"])
def test_who_watches_sees_what_the_loop_would_show(one_lm, name, tmp_path):
    policy, theirs = (tiny_policy(one_lm, "{x}", SUPPORTS[name]) for _ in range(2))

    def seen(sampler):
        found = {i: [] for i in range(12)}

        def watch(number, token, log_q):
            for i, *drawn in zip(number.tolist(), token.tolist(), log_q.tolist(), strict=True):
                found[i].append(drawn)

        sampler.sample(replace(many(policy), watch=watch))
        return found

    with serving(theirs, tmp_path) as (url, _):
        mine = seen(LocalSampler(policy.model, policy.sharing))
        other = seen(HTTPSampler(url, policy, patience=QUICK))
    for i, drawn in mine.items():
        assert [token for token, _ in other[i]] == [token for token, _ in drawn]
        assert [q for _, q in other[i]] == pytest.approx([q for _, q in drawn], abs=1e-5)


# Several servers, and draws before they are needed


@contextmanager
def two_servers(policy, folder):
    others = [tiny_policy(policy.lm, "{x}", SUPPORTS["one stop"]) for _ in range(2)]
    with serving(others[0], folder / "a") as (a, one), serving(others[1], folder / "b") as (b, other):
        yield [a, b], [one, other]


def many(policy):
    prompts = policy.encode_rows([{"x": x} for x in ("a", "b", "the cat", "the", "at", "cat")])
    return Asked(prompts, [4, 1, 0, 3, 2, 2], [5, 6, 7, 8, 9, 1], policy.support)


def same(a, b):
    return all(
        torch.allclose(x, y, atol=1e-5)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        if isinstance(x, torch.Tensor)
    )


def test_servers_share_the_work_and_each_is_checked(pair, tmp_path):
    policy, _ = pair
    local = LocalSampler(policy.model, policy.sharing).sample(many(policy))
    with two_servers(policy, tmp_path) as (urls, engines):
        sampler = HTTPSampler(urls, policy, patience=QUICK)
        before = [engine.finished for engine in engines]
        assert same(sampler.sample(many(policy)), local)
        assert all(engine.finished > n for engine, n in zip(engines, before, strict=True))
        assert sum(engine.finished for engine in engines) - sum(before) == 12
        engines[1].lost = True
        with pytest.raises(RolloutError, match="without the weights"):
            sampler.load(moved(policy), 1)


def test_the_others_go_on_without_a_server_until_it_is_back(pair, tmp_path, caplog):
    policy, _ = pair
    local = LocalSampler(policy.model, policy.sharing).sample(many(policy))
    with two_servers(policy, tmp_path) as (urls, engines):
        sampler = HTTPSampler(urls, policy, patience=QUICK)
        away = sampler._fleet.servers[1].connection
        away._port, port = 1, away._port
        assert same(sampler.sample(many(policy)), local)
        assert f"going on without {urls[1]}: " in caplog.text
        sampler.load(moved(policy), 1)
        away._port = port
        sampler.load(policy.weights(), 2)
        assert f"{urls[1]} is back" in caplog.text
        before = engines[1].finished
        assert same(sampler.sample(many(policy)), local)
        assert engines[1].finished > before
        for server in sampler._fleet.servers:
            server.connection._port = 1
        with pytest.raises(RolloutError, match="cannot be reached"):
            sampler.sample(many(policy))


def test_what_was_asked_for_is_drawn_once_from_the_weights_of_then(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        now = sampler.sample(many(policy))
        sampler.ask(many(policy), due=1)
        sampler.load(moved(policy, 1.0), 1)
        finished = engine.finished
        fewer = replace(many(policy), counts=[2, 1, 0, 3, 2, 2])
        drawn = sampler.sample(fewer)
        assert same(drawn, now.select(torch.tensor([0, 1, *range(4, 12)])))
        assert (drawn.version, engine.finished) == (0, finished)
        # It is used up, and a request for more than was asked for is drawn anew.
        again = sampler.sample(fewer)
        assert (again.version, engine.finished) == (1, finished + 10)
        assert not torch.equal(again.log_q, drawn.log_q)
        sampler.ask(fewer, due=2)
        assert sampler.sample(many(policy)).version == 1
        sampler.ask(fewer, due=2)
        sampler.ahead.forget(2)
        assert all(key_of(one, sampler._support(one.law).name) in sampler.ahead for one in fewer.each())
        sampler.ahead.forget(3)
        assert not any(key_of(one, sampler._support(one.law).name) in sampler.ahead for one in fewer.each())


def test_weights_that_are_under_way_are_checked_later(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, engine):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        engine.lost = True
        sampler.send(moved(policy), 1)
        assert len(sampler.sample(asked(policy))) == 4
        with pytest.raises(RolloutError, match="without the weights"):
            sampler.check()


def test_a_failed_draw_is_not_saved(pair, tmp_path):
    policy, theirs = pair
    with serving(theirs, tmp_path) as (url, _):
        sampler = HTTPSampler(url, policy, patience=QUICK)
        one, other = many(policy).each()[:2]
        drawn = sampler.sample(one)
        sampler.ask(one, due=1)
        sampler.ask(other, due=1)
        failed = Future()
        failed.set_exception(RolloutError("it is gone"))
        sampler.ahead.put(key_of(other, sampler._support(other.law).name), failed, 1)
        sampler.ahead.save(tmp_path)
        with pytest.raises(RolloutError, match="it is gone"):
            sampler.sample(other)
        sampler.load(moved(policy, 1.0), 1)
        sampler.ahead.load(tmp_path)
        assert same(sampler.sample(one), drawn)
        assert sampler.sample(other).version == 1
