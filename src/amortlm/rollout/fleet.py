"""Servers of completions that share the work. One that cannot be reached any more leaves it to the others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from amortlm.rollout.connection import UnreachableError
from amortlm.rollout.server import Server

T = TypeVar("T")
logger = logging.getLogger(__name__)
AT_ONCE = 32  # requests to a server


class Fleet:
    """Threads that give each task to the server that has least to do."""

    def __init__(self, servers: Sequence[Server]):
        self.servers = list(servers)
        self._lost: set[Server] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(AT_ONCE * len(servers), "rollout")
        self._loading = ThreadPoolExecutor(len(servers), "load")  # new weights wait for no draws

    def submit(self, work: Callable[[Server], T]) -> Future[T]:
        """The result of `work` on some server."""
        return self._threads.submit(self._on_some, work)

    def everywhere(self, work: Callable[[Server], T]) -> list[Future[T | None]]:
        """The results of `work` on every server, also on those that were lost and are back; None for those that cannot
        be reached."""
        return [self._loading.submit(self._on_one, server, work) for server in self.servers]

    def _on_one(self, server: Server, work: Callable[[Server], T]) -> T | None:
        was_lost = server in self._lost
        if was_lost and not server.connection.is_there():
            return None
        try:
            found = work(server)
        except UnreachableError as e:
            self._lose(server, e)
            return None
        if was_lost:
            logger.warning("%s is back", server.connection.url)
            with self._lock:
                self._lost.discard(server)
        return found

    def _on_some(self, work: Callable[[Server], T]) -> T:
        while True:
            with self._lock:
                server = min(self._reached(), key=lambda s: s.busy)
                server.busy += 1
            try:
                return work(server)
            except UnreachableError as e:
                self._lose(server, e)
            finally:
                with self._lock:
                    server.busy -= 1

    def _reached(self) -> list[Server]:
        return [server for server in self.servers if server not in self._lost]

    def _lose(self, server: Server, error: UnreachableError) -> None:
        """Go on without a server; raises the error if no other is left."""
        with self._lock:
            if not set(self._reached()) - {server}:
                raise error
            if server not in self._lost:
                self._lost.add(server)
                logger.warning("going on without %s: %s", server.connection.url, error)
