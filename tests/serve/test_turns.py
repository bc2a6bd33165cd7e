"""A long function does not hold up others: what is done between its passes changes nothing, neither there nor here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import make_trainer

from amortlm import LanguageModel, Posterior
from amortlm.engine.passes import pausing
from amortlm.posterior import Ask, Samples
from amortlm.serve.drawing import PlainDraw, draw_together
from amortlm.serve.worker import Background, Call, DroppedError, Worker

ROW = {"x": "the cat"}
MOST = 8
SECONDS = 60  # far more than anything takes


@pytest.fixture
def worker(posterior: Posterior) -> Iterator[Worker]:
    worker = Worker(lambda works: draw_together(posterior, works), most=1000)
    yield worker
    worker.close()


class Asking:
    """Asks for draws before each of the first passes of a function, on the function's own thread: so there is something to do in each
    pause, whatever the order of threads."""

    def __init__(
        self, worker: Worker, function: Callable[[], Any], work: type[Call] | type[Background] = Call
    ):
        self.worker, self.draws = worker, list[PlainDraw]()
        self.work = work(lambda: self._run(function))

    def _run(self, function: Callable[[], Any]) -> Any:
        from amortlm.engine import passes

        others_turn = passes._pause.get()
        assert others_turn is not None

        def pause() -> None:
            if len(self.draws) < MOST:
                self.draws.append(PlainDraw(Ask(ROW, 3, len(self.draws))))
                self.worker.submit(self.draws[-1])
            others_turn()

        with pausing(pause):
            return function()


def assert_draws_are_alone(posterior: Posterior, draws: list[PlainDraw]) -> None:
    for draw in draws:
        found: Samples = draw.future.result(SECONDS).samples
        alone = posterior.sample(ROW, 3, seed=draw.ask.seed)
        assert [s.tokens for s in found] == [s.tokens for s in alone]
        assert [s.log_q for s in found] == pytest.approx([s.log_q for s in alone], abs=1e-5)


@pytest.mark.parametrize("kind", [Call, Background])
def test_a_correction_is_what_it_is_alone(
    posterior: Posterior, worker: Worker, kind: type[Call] | type[Background]
) -> None:
    def correct() -> Samples:
        return posterior.sample(ROW, 4, correct="smc", budget=16)

    asking = Asking(worker, correct, kind)
    worker.submit(asking.work)
    found, alone = asking.work.future.result(SECONDS), correct()
    assert len(asking.draws) == MOST
    assert (found, found.summary()) == (alone, alone.summary())
    assert_draws_are_alone(posterior, asking.draws)


@pytest.mark.slow
def test_a_training_ends_with_the_weights_that_it_has_alone(
    one_lm: LanguageModel, posterior: Posterior, worker: Worker, tmp_path: Path
) -> None:
    def trained(folder: str) -> dict[str, torch.Tensor]:
        trainer = make_trainer(one_lm, tmp_path / folder, max_steps=3)
        trainer.train()
        return trainer.posterior.policy.weights()

    asking = Asking(worker, lambda: trained("asked"), Background)
    worker.submit(asking.work)
    found, alone = asking.work.future.result(SECONDS), trained("alone")
    assert len(asking.draws) == MOST
    assert_draws_are_alone(posterior, asking.draws)
    assert found.keys() == alone.keys()
    for name, value in found.items():
        assert torch.equal(value, alone[name]), name


def test_draws_and_calls_do_not_wait_for_what_is_in_the_background(
    posterior: Posterior, worker: Worker
) -> None:
    ended = threading.Event()

    def until_the_others_are_done() -> None:
        while not ended.is_set():
            posterior.sample(ROW)

    long = Background(until_the_others_are_done)
    worker.submit(long)
    draw, call = PlainDraw(Ask(ROW)), Call(lambda: posterior.sample(ROW))
    for work in (draw, call):
        worker.submit(work)
    try:
        assert call.future.result(SECONDS)[0].tokens == draw.future.result(SECONDS).samples[0].tokens
        assert not long.future.done()
    finally:
        ended.set()
    long.future.result(SECONDS)


def test_a_call_waits_for_a_call_and_a_draw_does_not(posterior: Posterior, worker: Worker) -> None:
    ended, order = threading.Event(), list[str]()

    def long() -> None:
        while not ended.is_set():
            posterior.sample(ROW)
        order.append("first call")

    worker.submit(Call(long))
    second, draw = Call(lambda: order.append("second call")), PlainDraw(Ask(ROW))
    worker.submit(second)
    worker.submit(draw)
    draw.future.result(SECONDS)
    assert order == []
    ended.set()
    second.future.result(SECONDS)
    assert order == ["first call", "second call"]


def test_what_nobody_waits_for_ends_before_its_next_pass(posterior: Posterior, worker: Worker) -> None:
    begun, passes = threading.Event(), 0

    def for_ever() -> None:
        nonlocal passes
        while True:
            posterior.sample(ROW)
            begun.set()
            passes += 1

    call = Call(for_ever)
    worker.submit(call)
    assert begun.wait(SECONDS)
    call.drop()
    with pytest.raises(DroppedError):
        call.future.result(SECONDS)
    done = passes
    assert worker_is_free(worker)
    assert passes == done


def worker_is_free(worker: Worker) -> bool:
    next_call = Call(lambda: True)
    worker.submit(next_call)
    return bool(next_call.future.result(SECONDS))


def test_what_is_in_the_background_ends_itself(posterior: Posterior, worker: Worker) -> None:
    """Control of the test before: it is not cut."""
    begun = threading.Event()

    def some() -> int:
        for _ in range(20):
            posterior.sample(ROW)
            begun.set()
        return 20

    work = Background(some)
    worker.submit(work)
    assert begun.wait(SECONDS)
    work.drop()
    assert work.future.result(SECONDS) == 20


def test_a_pause_has_neither_gradients_nor_the_precision_of_the_pass(posterior: Posterior) -> None:
    seen = list[tuple[bool, bool]]()

    def pause() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        posterior.policy.sample([ROW])  # makes no pauses of its own

    rollouts, _ = posterior.policy.sample([ROW], 2)
    with pausing(pause), torch.autocast("cpu", torch.bfloat16):
        log_q = posterior.policy.evaluate(rollouts)
    assert seen
    assert set(seen) == {(False, False)}
    assert log_q.log_pterm.requires_grad
    count = len(seen)
    posterior.policy.evaluate(rollouts)
    assert len(seen) == count, "after the block there are no pauses"
