"""A real server: streams token by token, clients that leave or do not read, OpenAI's own client, and all at once."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reference import tiny_policy
from serving import events, joined, open_stream, post, running, until
from torch import Tensor

from amortlm import LanguageModel, Posterior, Support
from amortlm.serve import Limits, create_app, wire
from amortlm.support.law import SupportLaw

PATH = "/v1/completions"


class Steps:
    """Lets the decoding loop take one step at a time; -1 lets it run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.allowed = threading.Semaphore(0)
        self.taken, self.free = 0, False
        real = SupportLaw.step

        def step(law: SupportLaw, *args: Tensor) -> Any:
            if not self.free:
                assert self.allowed.acquire(timeout=30)
            self.taken += 1
            return real(law, *args)

        monkeypatch.setattr(SupportLaw, "step", step)

    def run(self) -> None:
        self.free = True
        self.allowed.release()


def test_texts_are_sent_token_by_token(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(9) if len(posterior.sample({"x": "the dog"}, 1, seed=s)[0].tokens) == 8)
    sample = posterior.sample({"x": "the dog"}, 1, seed=seed)[0]
    with running(create_app(posterior)) as port:
        steps = Steps(monkeypatch)
        steps.allowed.release()  # the first token
        with open_stream(port, {"prompt": "the dog", "seed": seed}) as response:
            found = events(response)
            for k in range(8):
                (choice,) = next(found)["choices"]
                assert choice["text"] == posterior.lm.decode([sample.tokens[k]])
                assert steps.taken == k + 1  # the next is not drawn yet
                steps.allowed.release()
            *_, last, done = found
    assert done == "[DONE]"
    assert last["choices"][0]["log_q"] == pytest.approx(sample.log_q, abs=1e-4)


@pytest.mark.slow
def test_a_character_of_several_tokens_is_sent_whole(embedded: LanguageModel) -> None:
    letters = sorted({t for text in "é🙂—a" for t in embedded.encode_continuation(text)})
    support = Support(stop=".", min_tokens=12, max_tokens=40, allowed_tokens=letters)
    posterior = Posterior(tiny_policy(embedded, "{x}", support), None)
    with running(create_app(posterior)) as port:
        for seed in range(2):
            asked = {"prompt": "One day", "n": 8, "seed": seed}
            with open_stream(port, asked) as response:
                found = list(events(response))
            assert joined(found) == [c["text"] for c in post(port, PATH, asked)[1]["choices"]]
            assert len(found) > 4


def test_who_leaves_a_stream_ends_its_pass(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(9) if len(posterior.sample({"x": "the dog"}, 1, seed=s)[0].tokens) == 8)
    app = create_app(posterior)
    with running(app) as port:
        steps = Steps(monkeypatch)
        steps.allowed.release()
        works: list[Any] = []
        real = app.state.service.worker.submit
        monkeypatch.setattr(app.state.service.worker, "submit", lambda w: (works.append(w), real(w)))
        with open_stream(port, {"prompt": "the dog", "seed": seed}) as response:
            next(events(response))
        until(lambda: works[0].gone)
        steps.run()
        assert works[0].future.result(30) is None
        assert steps.taken <= 3
        assert post(port, PATH, {"prompt": "a"})[0] == 200


@pytest.mark.slow
def test_who_does_not_read_holds_up_nobody(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "GRACE", 0.1)
    support = Support(stop="</s>", min_tokens=50, max_tokens=60)
    long = Posterior(tiny_policy(one_lm, "{x}", support), None)
    app = create_app(long, limits=Limits(seconds=4))
    asked = {"prompt": "a", "n": 120, "seed": 1}
    works: list[Any] = []
    submit = app.state.service.worker.submit
    monkeypatch.setattr(app.state.service.worker, "submit", lambda w: (works.append(w), submit(w)))
    with running(app, send_buffer=4096) as port, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", port))
        body = json.dumps({**asked, "stream": True})
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        slow.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: works and works[0].future.done())
        answer = post(port, PATH, {"prompt": "a", "seed": 1})[1]
        assert answer["choices"][0]["text"] == long.sample({"x": "a"}, seed=1)[0].text
        until(lambda: works[0].gone)  # the server gives the stream up
        received = b"".join(iter(lambda: slow.recv(2**16), b""))
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
        # Control: a client that reads gets it all.
        with open_stream(port, asked) as response:
            assert list(events(response))[-1] == "[DONE]"


def test_a_stream_that_takes_too_long_says_so(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(create_app(posterior, limits=Limits(seconds=0.5))) as port:
        steps = Steps(monkeypatch)
        steps.allowed.release()
        with open_stream(port, {"prompt": "the dog", "seed": 0}) as response:
            *_, last = events(response)
        assert last["error"]["code"] == "timeout"
        steps.run()


def test_an_error_in_a_stream_ends_it(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(create_app(posterior)) as port:
        steps = Steps(monkeypatch)
        steps.allowed.release()
        with open_stream(port, {"prompt": "the dog", "seed": 0}) as response:
            found = events(response)
            next(found)
            assert posterior.target is not None
            monkeypatch.setattr(type(posterior.target), "score_final", lambda *_: 1 / 0)
            steps.run()
            *_, last = found
    assert last["error"]["code"] == "internal_error"
    assert "division" not in str(last)


@pytest.mark.slow
def test_openai_s_client(posterior: Posterior, infilling: Posterior) -> None:
    openai = pytest.importorskip("openai")
    with running(create_app(posterior, name="tiny", api_key="secret")) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked: dict[str, Any] = {"model": "tiny", "prompt": "the dog", "n": 3, "seed": 4}
        whole = client.completions.create(**asked)
        samples = posterior.sample({"x": "the dog"}, 3, seed=4)
        assert [c.text for c in whole.choices] == [s.text for s in samples]
        assert [c.log_q for c in whole.choices] == pytest.approx([s.log_q for s in samples], abs=1e-4)
        assert [c.weight for c in whole.choices] == pytest.approx([s.weight for s in samples], abs=1e-4)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert joined([part.model_dump() for part in parts]) == [s.text for s in samples]
        assert parts[-1].usage == whole.usage
        extra = {"correct": "sir", "budget": 64}
        corrected = client.completions.create(**asked, extra_body=extra)
        wanted = posterior.sample({"x": "the dog"}, 3, seed=4, **extra)
        assert [c.text for c in corrected.choices] == [s.text for s in wanted]
        assert corrected.amortlm["method"] == "sir"
        with pytest.raises(openai.BadRequestError, match="support fixes the length") as refused:
            client.completions.create(**asked, max_tokens=3)
        assert (refused.value.param, refused.value.code) == ("max_tokens", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**asked, "model": "gpt-4"})
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
    with running(create_app(infilling)) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        row = {"x": "a", "y": " cat"}
        answer = client.completions.create(model="posterior", prompt="", seed=1, extra_body={"columns": row})
        assert answer.choices[0].text == infilling.sample(row, seed=1)[0].text


@pytest.mark.slow
def test_under_load_every_answer_is_its_own(posterior: Posterior) -> None:
    """32 clients at once, each with its own rows, seeds, n, streams and corrections; some leave, some ask for what is
    refused. Every answer is the one computed alone."""
    limits, clients, each = Limits(waiting=1000, seconds=300), 32, 7
    app = create_app(posterior, limits=limits)
    batches: list[int] = []
    real = posterior.sample_each

    def counted(asks: Any, **settings: Any) -> Any:
        batches.append(len(asks))
        return real(asks, **settings)

    posterior.sample_each = counted  # type: ignore[method-assign]
    try:
        with running(app) as port, ThreadPoolExecutor(clients) as pool:
            found = [f for part in pool.map(lambda k: _client(port, k, each), range(clients)) for f in part]
    finally:
        del posterior.sample_each
    kinds = [kind for kind, _, _ in found]
    assert len(found) == clients * each
    assert {"whole", "stream", "left", "refused", "sir"} == set(kinds)
    assert max(batches) > 4
    assert sum(batches) < clients * each
    for kind, asked, choices in found:
        if choices is None:
            continue
        row, n, seed = {"x": asked["prompt"]}, asked["n"], asked["seed"]
        settings = {"correct": "sir", "budget": 32} if kind == "sir" else {}
        samples = posterior.sample(row, n, seed=seed, **settings)  # type: ignore[arg-type]
        assert [c["text"] for c in choices] == [s.text for s in samples]
        for name in ("log_q", "log_reward", "weight"):
            alone = [getattr(s, name) for s in samples]
            assert [c[name] for c in choices] == pytest.approx(alone, abs=1e-4)


def _client(port: int, number: int, requests: int) -> list[tuple[str, dict[str, Any], Any]]:
    """(kind, request, choices with whole texts; None where there are none) of each request."""
    dice, found = random.Random(number), list[tuple[str, dict[str, Any], Any]]()
    for i in range(requests):
        prompt = dice.choice(["the dog", "a", "the cat ran", "a dog, a cat", f"{'ab' * dice.randint(1, 9)}"])
        asked = {"prompt": prompt, "n": dice.choice([1, 1, 2, 5, 16]), "seed": dice.randint(0, 5)}
        kind = ("whole", "stream", "left", "refused", "whole", "stream", "sir")[(i + number) % 7]
        choices = None
        if kind in ("whole", "sir"):
            extra = {"correct": "sir", "budget": 32} if kind == "sir" else {}
            status, answer = post(port, PATH, {**asked, **extra})
            assert status == 200, answer
            choices = answer["choices"]
        elif kind == "stream":
            with open_stream(port, asked) as response:
                events_ = list(events(response))
            assert events_[-1] == "[DONE]"
            texts = joined(events_)
            choices = [{**c, "text": texts[c["index"]]} for c in events_[-2]["choices"]]
        elif kind == "left":
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", PATH, json.dumps({**asked, "stream": bool(i % 2)}), headers)
            time.sleep(dice.random() * 0.02)
            connection.close()
        else:
            bad = dice.choice([{"prompt": "the dog " * 40}, {"temperature": 2}, {"n": 0}])
            assert post(port, PATH, {**asked, **bad})[0] == 400
        found.append((kind, asked, choices))
    return found
