"""Between HTTP and the model thread: bodies within limits, waiting for a work, streams of events.

A client that disconnects drops its work, and one that is slow holds up nobody else: what its stream has not sent yet is
the text of its own completions, and after the time limit the connection is closed.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from amortlm.serve.refusals import RequestError
from amortlm.serve.worker import Work
from amortlm.types import finite

GRACE = 5.0  # seconds beyond the time limit, in which a stream can still tell its client why it ends
CLOSE = {"Connection": "close"}  # the rest of a body is not read


def as_json(content: Any) -> str:
    """Strict JSON in ASCII: null for NaN and infinities, and half a character harms nobody."""
    return json.dumps(finite(content), separators=(",", ":"))


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(content), status, headers, "application/json")


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Raises RequestError for another content type, more than `most` bytes, and a client that takes longer."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps out what a browser sends for a foreign page without asking
        raise RequestError(415, "send the parameters as JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise RequestError(413, f"the body may have at most {most:,} bytes", headers=CLOSE)
    except TimeoutError:
        raise RequestError(
            408, f"the body did not arrive within {seconds:g} seconds", headers=CLOSE
        ) from None
    except ClientDisconnect:
        raise _gone() from None
    return bytes(body)


class Inbox:
    """What the completions of a stream have grown by and is not sent yet. Any thread may put."""

    def __init__(self) -> None:
        self._loop, self._lock = asyncio.get_running_loop(), threading.Lock()
        self._texts: dict[int, str] = {}
        self.filled = asyncio.Event()

    def put(self, completion: int, text: str) -> None:
        with self._lock:
            self._texts[completion] = self._texts.get(completion, "") + text
        with suppress(RuntimeError):  # the loop has ended, and the stream with it
            self._loop.call_soon_threadsafe(self.filled.set)

    def take(self) -> dict[int, str]:
        """The texts by number of the completion, in the order of these."""
        self.filled.clear()
        with self._lock:
            texts, self._texts = self._texts, {}
        return dict(sorted(texts.items()))


async def outcome(
    request: Request, work: Work, seconds: float, inbox: Inbox | None = None
) -> asyncio.Future[Any]:
    """The work's future once it is done; or, with an inbox, once there is something in it.

    A work that takes longer, or whose client has gone, is dropped, and RequestError raised.
    """
    done = future_of(work)
    waits: set[asyncio.Future[Any]] = {done, gone := asyncio.ensure_future(_disconnected(request.receive))}
    if inbox is not None:
        waits.add(asyncio.ensure_future(inbox.filled.wait()))
    try:
        finished, _ = await asyncio.wait(waits, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
        if done in finished or finished - {gone}:
            return done
        raise _gone() if gone in finished else too_late()
    except BaseException:
        work.drop()
        raise
    finally:
        for task in waits - {done}:
            task.cancel()


def future_of(work: Work) -> asyncio.Future[Any]:
    """The work's future for this event loop. Nobody has to look at its error."""
    done = asyncio.wrap_future(work.future)
    done.add_done_callback(lambda f: f.cancelled() or f.exception())
    return done


def too_late() -> RequestError:
    return RequestError(
        504, "the time limit of the server was reached: ask for less, or try again", code="timeout"
    )


def _gone() -> RequestError:
    return RequestError(499, "the client has disconnected")  # read by nobody


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Ends, and drops the work, when the client disconnects, or does not read for too long."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], work: Work, seconds: float):
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._work, self._seconds = events, work, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_disconnected(receive))]
        try:
            await asyncio.wait(tasks, timeout=self._seconds + GRACE, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self._work.drop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            body = f"data: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
