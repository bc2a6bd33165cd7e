"""Limits and the key: what is too much is refused, and what is refused costs the model nothing."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving import post, running, until

from amortlm import Posterior
from amortlm.errors import ConfigError
from amortlm.serve import Limits, create_app
from amortlm.serve.app import KEY

PATH = "/v1/completions"
ASK = {"prompt": "a", "seed": 1}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


class Busy:
    """Holds up every draw until it is opened, and counts the passes."""

    def __init__(self, posterior: Posterior, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.opened, self.asks = threading.Event(), threading.Event(), list[Any]()
        real = posterior.sample_each

        def slow(asks: Any, **settings: Any) -> Any:
            self.asks.append([ask.seed for ask in asks])
            self.begun.set()
            assert self.opened.wait(30)
            return real(asks, **settings)

        monkeypatch.setattr(posterior, "sample_each", slow)


@pytest.fixture
def busy(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    found = Busy(posterior, monkeypatch)
    yield found
    found.opened.set()


@contextmanager
def asking(port: int, *bodies: dict[str, Any]) -> Iterator[list[tuple[int, Any]]]:
    """Requests in threads; their answers are there after the block."""
    found: list[Any] = [None] * len(bodies)

    def ask(i: int) -> None:
        found[i] = post(port, PATH, bodies[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join(60)


def test_a_body_is_bounded(posterior: Posterior) -> None:
    with running(create_app(posterior, limits=Limits(body=1000))) as port:
        assert post(port, PATH, ASK)[0] == 200
        status, answer = post(port, PATH, {"prompt": "a" * 1000})
        assert status == 413
        assert "1,000 bytes" in answer["error"]["message"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", PATH, (b"x" * 100 for _ in range(20)), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert post(port, PATH, ASK)[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(posterior: Posterior) -> None:
    with running(create_app(posterior, limits=Limits(seconds=0.2))) as port, socket.socket() as slow:
        slow.settimeout(30)
        slow.connect(("127.0.0.1", port))
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99"
        slow.sendall(f"{head}\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_is_refused(client: TestClient, kind: str) -> None:
    response = client.post(PATH, content=json.dumps(ASK), headers={"Content-Type": kind})
    assert response.status_code == 415


def test_the_queue_is_bounded(posterior: Posterior, busy: Busy) -> None:
    app = create_app(posterior, limits=Limits(waiting=2))
    with running(app) as port, asking(port, {**ASK, "seed": 1}) as first:
        assert busy.begun.wait(30)
        with asking(port, {**ASK, "seed": 2}, {**ASK, "seed": 3}) as others:
            worker = app.state.service.worker
            until(lambda: len(worker._waiting) == 2)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", PATH, json.dumps(ASK), {"Content-Type": "application/json"})
            refused = connection.getresponse()
            assert (refused.status, refused.getheader("Retry-After")) == (429, "1")
            assert json.loads(refused.read())["error"]["code"] == "queue_full"
            busy.opened.set()
    assert [status for status, _ in (*first, *others)] == [200] * 3
    assert sorted(map(len, busy.asks)) == [1, 2]  # what waited was drawn together


def test_a_request_ends_in_time_and_is_dropped_if_it_has_not_begun(posterior: Posterior, busy: Busy) -> None:
    app = create_app(posterior, limits=Limits(seconds=0.5))
    with running(app) as port:
        with asking(port, {**ASK, "seed": 1}) as first:
            assert busy.begun.wait(30)
            status, answer = post(port, PATH, {**ASK, "seed": 2})
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert answer["error"]["type"] == "server_error"
        assert first[0][0] == 504
        busy.opened.set()
        assert post(port, PATH, {**ASK, "seed": 3})[0] == 200
    assert busy.asks == [[1], [3]]


def test_who_disconnects_while_waiting_is_not_drawn(posterior: Posterior, busy: Busy) -> None:
    app = create_app(posterior)
    with running(app) as port:
        with asking(port, {**ASK, "seed": 1}) as first:
            assert busy.begun.wait(30)
            worker = app.state.service.worker
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", PATH, json.dumps({**ASK, "seed": 2}), headers)
            until(lambda: worker._waiting)
            (left,) = worker._waiting
            connection.close()
            until(lambda: left.gone)
            busy.opened.set()
        assert first[0][0] == 200
        assert post(port, PATH, {**ASK, "seed": 3})[0] == 200
    assert busy.asks == [[1], [3]]


def test_limits_are_positive() -> None:
    for name in ("n", "draws", "body", "waiting", "seconds"):
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=name):
                Limits(**{name: value})


class TestKey:
    @pytest.fixture(params=["argument", "environment"])
    def locked(
        self, request: pytest.FixtureRequest, posterior: Posterior, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[TestClient]:
        if request.param == "environment":
            monkeypatch.setenv(KEY, "sécret")
        given = {} if request.param == "environment" else {"api_key": "sécret"}
        with TestClient(create_app(posterior, **given)) as client:
            yield client

    @pytest.mark.parametrize(
        "given", [None, "", "Bearer", "Bearer ", "Bearer secret", "Basic sécret", "sécret"]
    )
    def test_without_it_everything_but_health_is_refused(self, locked: TestClient, given: str | None) -> None:
        headers = {} if given is None else {"Authorization": given.encode()}
        for method, path in [
            ("POST", PATH),
            ("POST", "/posterior/estimate"),
            ("POST", "/posterior/diagnose"),
            ("GET", "/posterior"),
            ("GET", "/v1/models"),
        ]:
            response = locked.request(method, path, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert locked.get("/health", headers=headers).status_code == 200

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_with_it_all_is_well(self, locked: TestClient, scheme: str) -> None:
        headers = {"Authorization": f"{scheme} sécret".encode()}
        assert locked.get("/posterior", headers=headers).status_code == 200
        assert locked.post(PATH, json=ASK, headers=headers).status_code == 200

    def test_no_page_of_the_framework_is_open(self, locked: TestClient) -> None:
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert locked.get(path).status_code == 404
