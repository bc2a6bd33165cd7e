"""A real server in a thread, and what its clients do."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI


@contextmanager
def running(app: FastAPI, send_buffer: int | None = None) -> Iterator[int]:
    """The port of a server that runs in a thread. It ends, and must end, with the block.

    send_buffer: bytes that the system takes from the server before the client has read them.
    """
    taken = socket.create_server(("127.0.0.1", 0), backlog=2048)
    if send_buffer is not None:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield taken.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """(status, JSON) of a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


@contextmanager
def open_stream(port: int, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """The response to a request for a stream; the block's end disconnects."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(
        "POST", "/v1/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert (response.getheader("content-type") or "").startswith("text/event-stream")
    try:
        yield response
    finally:
        response.close()
        connection.close()


def events(response: Any) -> Iterator[Any]:
    """The events of a stream; the last is "[DONE]"."""
    for line in response:
        text = line.decode().strip()
        if text:
            assert text.startswith("data: "), text
            yield text[6:] if text == "data: [DONE]" else json.loads(text[6:])


def joined(found: list[Any]) -> list[str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for event in found:
        for choice in event["choices"] if isinstance(event, dict) else ():
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[i] for i in sorted(texts)]
