"""The one thread that owns the model: it does what others hand in, in turn, and draws together what waits to be drawn.

An event loop hands in a `Work` and waits for its future. It drops a work that nobody waits for any more: one that has
not begun is then left out, and one that has begun ends before its next pass through a model. A long call does not hold
up others: between its passes, what waits to be drawn is drawn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from amortlm.engine.passes import pausing

BATCH = 256  # completions drawn together


@dataclass(eq=False)
class Work:
    """Something to be done on the model thread; the future gets its result or its error."""

    future: Future[Any] = field(default_factory=Future, init=False)
    gone: bool = field(default=False, init=False)  # nobody waits for it any more

    def drop(self) -> None:
        self.gone = True
        self.future.cancel()  # without effect once it has begun


@dataclass(eq=False)
class Call(Work):
    """Any function. Between its passes, draws go first."""

    function: Callable[[], Any]


@dataclass(eq=False)
class Background(Work):
    """A function that takes minutes. Between its passes, draws and calls go first. It ends itself once it is gone."""

    function: Callable[[], Any]


@dataclass(eq=False)
class Draw(Work):
    """`size` completions, to be drawn together with those of others."""

    size: int = field(default=1, init=False)


class QueueFullError(Exception):
    """Too much is waiting."""


class ClosedError(Exception):
    """The service ends."""


class DroppedError(Exception):
    """Nobody waits for the call any more."""


class Worker:
    """`draw` draws for several works at once and sets all of their futures. The thread starts with the first work.

    most: number of works that may wait.
    """

    def __init__(self, draw: Callable[[list[Any]], None], most: int):
        self._draw, self._most = draw, most
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> None:
        """Raises QueueFullError if too many wait, ClosedError after `close`."""
        with self._changed:
            if self._closed:
                raise ClosedError
            self._waiting = deque(w for w in self._waiting if not w.gone)
            if len(self._waiting) >= self._most:
                raise QueueFullError
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="amortlm-model", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, seconds: float = 5.0) -> None:
        """What waits fails with ClosedError; what has begun may take that many seconds to end."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify()
        for work in left:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(ClosedError())
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while works := self._next():
            self._begin(works)

    def _next(self) -> list[Work]:
        """What is to be done at once; nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return [] if self._closed else self._taken(Work)

    def _taken(self, *kinds: type[Work]) -> list[Work]:
        """The first of these kinds that waits and, if it is to be drawn, the draws behind it that fit. Under the
        lock."""
        taken, left, room = list[Work](), deque[Work](), BATCH
        for work in self._waiting:
            is_first = not taken and isinstance(work, kinds)
            fits = taken and isinstance(taken[0], Draw) and isinstance(work, Draw) and work.size <= room
            if is_first or (fits and not work.gone):
                taken.append(work)
                room -= work.size if isinstance(work, Draw) else 0
            else:
                left.append(work)
        self._waiting = left
        return taken

    def _begin(self, works: list[Work]) -> None:
        begun = [work for work in works if work.future.set_running_or_notify_cancel()]
        if begun:
            self._do(begun)

    def _do(self, works: list[Work]) -> None:
        try:
            first = works[0]
            if isinstance(first, Call | Background):
                with pausing(lambda: self._pause(first)):
                    result = first.function()
                first.future.set_result(result)
            else:
                self._draw(works)
        except BaseException as e:  # whatever it is: the thread goes on with the next
            for work in works:
                if not work.future.done():
                    work.future.set_exception(e)

    def _pause(self, work: Call | Background) -> None:
        """Between two passes of a function: others have their turn."""
        if isinstance(work, Call) and work.gone:
            raise DroppedError
        with self._changed:
            works = self._taken(Draw) if isinstance(work, Call) else self._taken(Draw, Call)
        self._begin(works)
