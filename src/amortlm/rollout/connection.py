"""Requests to a server of completions, each with a time limit, and repeated while the server may come back."""

from __future__ import annotations

import http.client
import json
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from amortlm.errors import ConfigError, RolloutError

KEY = "AMORTLM_API_KEY"
PIECE = 2**16  # bytes read at a time


class UnknownError(Exception):
    """The server does not know the support or the adapter that a request names: it has started again since."""


class UnreachableError(RolloutError):
    """No answer: another server may have one."""


@dataclass(frozen=True)
class Patience:
    """request: seconds that one answer may take. outage: seconds without an answer, after which a server that cannot
    be reached is given up. pause: seconds between two tries."""

    request: float = 600.0
    outage: float = 60.0
    pause: float = 1.0


class Connection:
    """HTTP to one server, `http://host:port`, with the key of the environment variable AMORTLM_API_KEY."""

    def __init__(self, url: str, patience: Patience):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the address of a server: give one like http://127.0.0.1:8000")
        self.url, self.patience = url.rstrip("/"), patience
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")

    def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of the answer. Repeated while the server cannot be reached, which harms no request: it draws the
        same again.

        Raises UnknownError, UnreachableError, ConfigError for a request that the server refuses, and RolloutError for
        one that fails.
        """
        last = None
        while True:
            try:
                status, data = self._once(method, path, body)
            except TimeoutError as e:
                raise UnreachableError(
                    f"{self.url} has not answered {method} {path} in {self.patience.request:g} s: ask for fewer "
                    "completions at once, or give HTTPSampler more patience"
                ) from e
            except (OSError, http.client.HTTPException) as e:
                last = time.monotonic() + self.patience.outage if last is None else last
                if time.monotonic() >= last:
                    raise UnreachableError(
                        f"{self.url} cannot be reached, or breaks off ({type(e).__name__}: {e}); tried for "
                        f"{self.patience.outage:g} s: see the server's terminal, and start it again"
                    ) from e
                time.sleep(self.patience.pause)
                continue
            return self._checked(method, path, status, data)

    def is_there(self) -> bool:
        """Does the server answer at once?"""
        try:
            return self._once("GET", "/info", b"", limit=self.patience.pause)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _once(self, method: str, path: str, body: bytes, limit: float | None = None) -> tuple[int, bytes]:
        limit = self.patience.request if limit is None else limit
        end = time.monotonic() + limit
        connection = self._kind(self._host, self._port, timeout=limit)
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            parts = []
            # In pieces: the limit of a socket is one of each piece, and a server may send them slowly for ever.
            while piece := response.read1(PIECE):
                parts.append(piece)
                if time.monotonic() > end:
                    raise TimeoutError
            if response.length:  # read1 does not complain of an answer that is cut off
                raise http.client.IncompleteRead(b"", response.length)
            return response.status, b"".join(parts)
        finally:
            connection.close()

    def _checked(self, method: str, path: str, status: int, data: bytes) -> bytes:
        if status == 200:
            return data
        said = _message(data)
        if status == 410:
            raise UnknownError(said)
        if status == 401:
            raise ConfigError(
                f"{self.url} wants a key: set the environment variable {KEY} to that of the server"
            )
        if status in (400, 413, 422):
            raise ConfigError(f"{self.url} refuses {method} {path}: {said}")
        raise RolloutError(f"{self.url} answers {method} {path} with status {status}: {said}")


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace") or "no explanation"
