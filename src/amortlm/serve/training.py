"""A short training within the service, on the model thread: what it tells while it runs, and how it ends early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from amortlm.inference.correct import require_target
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.serve.refusals import request_error
from amortlm.serve.wire import as_json, future_of
from amortlm.serve.worker import Work
from amortlm.train.config import GFNConfig
from amortlm.train.looks import Look
from amortlm.train.trainer import GFNTrainer
from amortlm.types import Row

EVERY, DRAWS, SHOWN = 5, 32, 4  # a look: each 5 updates, 32 fresh samples, of which 4 are told
Tell = Callable[[dict[str, Any]], None]


class Training:
    """A training of a new sampler for the posterior of one row. It ends after the current update once `stop` is set."""

    def __init__(self, lm: LanguageModel, row: Row, updates: int, seed: int):
        self.lm, self.row, self.updates, self.seed = lm, row, updates, seed
        self.stop = False

    def run(self, posterior: Posterior, tell: Tell) -> Posterior:
        """The posterior with the trained sampler. Its folder is deleted. Raises what the trainer raises."""
        policy = posterior.policy
        with TemporaryDirectory(prefix="amortlm-play-", ignore_cleanup_errors=True) as folder:
            trainer = GFNTrainer(
                self.lm,
                target=require_target(posterior.target),
                prompt=policy.prompt.source,
                support=policy.support_spec,
                train_dataset=[self.row],
                args=self._settings(folder),
            )
            trainer.add_callback(_Progress(self, trainer.posterior, tell))
            trainer.train()
        return trainer.posterior

    def _settings(self, folder: str) -> GFNConfig:
        return GFNConfig(
            output_dir=folder,
            num_samples=16,
            max_steps=self.updates,
            learning_rate=1e-3,
            diagnose_steps=0,  # `_Progress` looks
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=self.lm.model.device.type == "cpu",
            seed=self.seed,
        )


class _Progress(TrainerCallback):
    def __init__(self, training: Training, posterior: Posterior, tell: Tell):
        self.training, self.posterior, self.tell = training, posterior, tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state.global_step)
        control.should_training_stop |= self.training.stop

    def _tell(self, step: int) -> None:
        event: dict[str, Any] = {"step": step, "steps": self.training.updates}
        if step % EVERY == 0 or step == self.training.updates:
            look = Look.at(self.posterior, self.training.row, DRAWS, self.training.seed)
            event |= {"ess": look.estimate.ess, "elbo": look.estimate.elbo}
            event["samples"] = [sample.text for sample in look.samples[:SHOWN]]
        self.tell(event)


class Post:
    """Events from any thread, for one reader in an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def put(self, event: dict[str, Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the stream with it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self, work: Work) -> AsyncIterator[str]:
        """What was put, until the work is done; then its result, or its error."""
        done = future_of(work)
        done.add_done_callback(lambda _: self._queue.put_nowait(None))
        while (event := await self._queue.get()) is not None:
            yield as_json(event)
        error = done.exception()
        yield as_json(done.result() if error is None else request_error(error).to_dict())
