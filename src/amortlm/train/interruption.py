"""Signals that end a run: before they take effect, the current step is finished and a checkpoint saved."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption(TrainerCallback):
    """A context (in the main thread) in which a signal ends training after the current step, with a checkpoint.
    `deliver` then lets the signal have its usual effect. The same signal a second time has its effect at once.

    A signal to one process of a run ends all processes, after the same step. With several processes a repeated signal
    does not act at once, because the launcher repeats signals itself, and kills processes that take too long.
    """

    def __init__(self, args: Any):
        self.args = args
        self.received = self.agreed = 0  # numbers of signals
        self.saved: Path | None = None  # the checkpoint that training ended with
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            handlers = {n: signal.getsignal(n) for n in SIGNALS}
            # Ignored signals (nohup) stay ignored; None is a handler that Python cannot restore.
            self._before = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received and self.args.world_size == 1:
            self.__exit__()
            signal.raise_signal(number)
        self.received = number
        logger.warning(
            "%s: finishing this step and saving a checkpoint first (the same signal again ends at once)",
            signal.Signals(number).name,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = self.received
        if args.world_size > 1:
            numbers = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            self.agreed = int(numbers)
        if self.agreed and not control.should_training_stop:
            control.should_save = True
            args.save_only_model = False  # this checkpoint must be resumable

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not before the save: a checkpoint stores whether training had ended.
        if self.agreed and not control.should_training_stop:
            control.should_training_stop = True
            self.saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero:
                logger.warning(
                    "%s: saved %s; resume_from_checkpoint=True (--resume) continues from there",
                    signal.Signals(self.agreed).name,
                    self.saved,
                )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved is not None:
            control.should_save = False  # it is saved already

    def deliver(self) -> None:
        """Let the signal have its effect: KeyboardInterrupt, the end of the process, or the program's own handler."""
        if number := self.agreed or self.received:
            signal.raise_signal(number)
