"""The model's thread: in turn, draws together, nothing lost, dropped work left out."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from amortlm.serve.worker import BATCH, Call, ClosedError, Draw, QueueFullError, Worker


class Gate:
    """A call that keeps the thread busy until it is opened."""

    def __init__(self, worker: Worker):
        self.begun, self.opened = threading.Event(), threading.Event()
        self.work = Call(self._wait)
        worker.submit(self.work)
        assert self.begun.wait(10)

    def _wait(self) -> None:
        self.begun.set()
        assert self.opened.wait(10)


def drawing(size: int = 1) -> Draw:
    work = Draw()
    work.size = size
    return work


class Log:
    """A worker that notes what it does together."""

    def __init__(self, most: int = 100):
        self.done: list[Any] = []
        self.worker = Worker(self.draw, most)

    def draw(self, works: list[Draw]) -> None:
        self.done.append([work.size for work in works])
        for work in works:
            work.future.set_result(work.size)


def test_draws_go_together_and_calls_in_turn() -> None:
    log = Log()
    gate = Gate(log.worker)
    calls = [Call(lambda i=i: log.done.append(i)) for i in range(2)]  # type: ignore[misc]
    works = [drawing(1), calls[0], drawing(2), calls[1], drawing(3)]
    for work in works:
        log.worker.submit(work)
    gate.opened.set()
    for work in works:
        work.future.result(10)
    assert log.done == [[1, 2, 3], 0, 1]


def test_a_batch_is_bounded_and_later_ones_are_not_overtaken_for_ever() -> None:
    log = Log()
    gate = Gate(log.worker)
    works = [drawing(n) for n in (200, 100, 56, 1, BATCH * 2)]
    for work in works:
        log.worker.submit(work)
    gate.opened.set()
    assert [work.future.result(10) for work in works] == [200, 100, 56, 1, BATCH * 2]
    assert log.done == [[200, 56], [100, 1], [BATCH * 2]]


def test_what_fails_fails_alone() -> None:
    log = Log()

    def broken() -> None:
        raise KeyboardInterrupt

    failed, fine = Call(broken), Call(lambda: 5)
    log.worker.submit(failed)
    log.worker.submit(fine)
    with pytest.raises(KeyboardInterrupt):
        failed.future.result(10)
    assert fine.future.result(10) == 5


def test_a_draw_that_raises_fails_all_that_are_left() -> None:
    def draw(works: list[Draw]) -> None:
        works[0].future.set_result(1)
        raise RuntimeError("broken")

    worker = Worker(draw, 10)
    gate = Gate(worker)
    first, second = drawing(), drawing()
    worker.submit(first)
    worker.submit(second)
    gate.opened.set()
    assert first.future.result(10) == 1
    with pytest.raises(RuntimeError):
        second.future.result(10)


def test_what_is_dropped_before_it_begins_is_not_done_and_takes_no_place() -> None:
    log = Log(most=2)
    gate = Gate(log.worker)
    dropped, kept, late = drawing(1), drawing(2), drawing(3)
    log.worker.submit(dropped)
    log.worker.submit(kept)
    with pytest.raises(QueueFullError):
        log.worker.submit(late)
    dropped.drop()
    log.worker.submit(late)
    gate.opened.set()
    assert (kept.future.result(10), late.future.result(10)) == (2, 3)
    assert log.done == [[2, 3]]
    assert dropped.future.cancelled()


def test_closing_fails_what_waits() -> None:
    log = Log()
    gate = Gate(log.worker)
    waiting, gone = drawing(), drawing()
    log.worker.submit(waiting)
    log.worker.submit(gone)
    gone.drop()
    log.worker.close(seconds=0)
    gate.opened.set()
    gate.work.future.result(10)
    with pytest.raises(ClosedError):
        waiting.future.result(10)
    with pytest.raises(ClosedError):
        log.worker.submit(drawing())
    assert log.done == []
    log.worker.close()
    assert log.worker._thread is not None
    assert not log.worker._thread.is_alive()
