"""One server of completions, as its client sees it: what it has been given, and how many requests it works on."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from amortlm.engine.decoding import Draws
from amortlm.engine.sampler import Request
from amortlm.errors import RolloutError
from amortlm.rollout import wire
from amortlm.rollout.connection import Connection, UnknownError

FORGETFUL = 3  # times that a server may start again during one request


@dataclass(frozen=True)
class Task:
    """A request with all that a server needs for it: tables of the support, and weights of one version."""

    request: Request
    support: wire.Named
    weights: wire.Named
    version: int

    @property
    def body(self) -> bytes:
        return wire.request_body(self.request, self.support.name, self.weights.name)


class Server:
    """For any number of threads: what one of them sends, all others use."""

    def __init__(self, connection: Connection):
        self.connection, self.busy = connection, 0
        self._given: set[str] = set()  # what it has been sent, since it was last found to have forgotten
        self._sending = threading.Lock()

    def draw(self, task: Task) -> Draws:
        """Raises ConfigError for prompts that do not fit the server's model, and for weights that it cannot load,
        RolloutError for a server that fails."""
        for _ in range(FORGETFUL):
            given = self._given
            try:
                self._give("/supports/", task.support)
                self.load(task.weights)
                answer = self.connection.call("POST", "/draw", task.body)
                return wire.draws(answer, task.request, task.version)
            except UnknownError:
                with self._sending:
                    if self._given is given:  # else another thread was faster
                        self._given = set()
        raise RolloutError(f"{self.connection.url} forgets what it is given: give it a higher --keep")

    def load(self, weights: wire.Named) -> None:
        """Send weights. Raises ConfigError if the server cannot load them."""
        self._give("/weights/", weights)

    def _give(self, path: str, named: wire.Named) -> None:
        if named.name in self._given:
            return
        with self._sending:
            if named.name not in self._given:
                self.connection.call("PUT", path + named.name, named.data)
                self._given.add(named.name)

    def about(self) -> wire.About:
        """Raises RolloutError if it is no server of completions."""
        answer = self.connection.call("GET", "/info")
        try:
            return wire.about(answer)
        except ValueError as e:
            raise RolloutError(
                f"{self.connection.url} does not answer like a server of completions: start one as docs/scale.md says"
            ) from e
