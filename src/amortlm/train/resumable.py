"""The part of `GFNTrainer` that claims folders and handles interruption, resume and saving; updates are elsewhere."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from amortlm.diagnostics import certificate
from amortlm.errors import RolloutError
from amortlm.files import replacing
from amortlm.policy.policy import Policy
from amortlm.posterior import Posterior
from amortlm.report import write_report
from amortlm.targets.base import Target
from amortlm.train import checkpoints, run
from amortlm.train.config import GFNConfig
from amortlm.train.interruption import Interruption
from amortlm.train.log_z import LearnedLogZ
from amortlm.train.looks import Looks
from amortlm.train.memory import RewardMemory
from amortlm.train.outcome import KeepBest, complaint
from amortlm.train.processes import Processes

logger = logging.getLogger(__name__)
CARD, SCHEDULER = "README.md", "scheduler.pt"


class ResumableTrainer(Trainer):
    """The subclass sets the attributes below, which are saved and read."""

    args: GFNConfig
    train_dataset: Any  # a list of rows
    eval_dataset: Any  # a list of rows, or None
    policy: Policy
    target: Target
    training_target: RewardMemory  # the target with finite rewards, used in training
    posterior: Posterior
    processes: Processes
    log_z: LearnedLogZ | None
    stores: Sequence[checkpoints.Store]
    gold: Any  # completions that the buffer starts with
    best: KeepBest | None
    looks: Looks
    chosen: Sequence[str]  # sentences on settings that were left open
    first_weights: str | None = None  # a name of the saved weights that the adapter starts from
    whole_weights: str | None = None  # a name of the weights of p, if they are sharded

    def train(  # type: ignore[override]
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        overwrite_output_dir: bool = False,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, then save the posterior into `args.output_dir`; `save_strategy` is only about checkpoints.

        resume_from_checkpoint: a checkpoint folder, or True for the last complete one in `output_dir`. A resumed run
        gives the same numbers as an uninterrupted one.
        overwrite_output_dir: delete the run that `output_dir` holds. Without either argument, a folder with checkpoints
        or a posterior is refused.

        SIGINT, SIGTERM and SIGHUP take effect (KeyboardInterrupt, the end of the process) after the current step and a
        checkpoint. Raises CheckpointError for a folder that is in use or of another run, for damaged checkpoints and
        for a full disk; TrainingError for a loss that is not finite and for a lost process.
        """
        folder = Path(str(self.args.output_dir))
        stated = run.identity(
            self.policy,
            self.target,
            self.train_dataset,
            self.args,
            start=self.first_weights,
            gold=self.gold,
            weights=self.whole_weights,
        )
        about = run.about(self.policy, self.target, self.train_dataset, self.chosen)
        with ExitStack() as held, Interruption(self.args) as stop, checkpoints.writing(folder):

            def claim() -> Path | None:
                held.enter_context(run.locked(folder))
                return run.prepare(
                    folder, stated, resume_from_checkpoint or False, overwrite_output_dir, about
                )

            found = self.processes.first(claim)
            if found is not None and (found == folder or checkpoints.is_over(found)):
                output = self._load_finished(found)
            else:
                output = self._run(None if found is None else str(found), stop, kwargs)
            if stop.saved is None and found != folder:
                self._finish(stated, about)
        stop.deliver()
        return output

    def _run(self, found: str | None, stop: Interruption, kwargs: dict[str, Any]) -> TrainOutput:
        if self.log_z is not None and found is None:
            temperature = self.args.reward_temperature_at(0)
            self.log_z.start(
                self.training_target, self.args.num_samples, temperature, (self.args.seed, "log_z")
            )
        self.add_callback(stop)
        try:
            with self.processes.blaming():
                return super().train(resume_from_checkpoint=found, **kwargs)
        except RolloutError as e:
            raise RolloutError(f"{e}. {self._saved_for_later()}") from e
        finally:
            self.remove_callback(stop)

    def _saved_for_later(self) -> str:
        """Save the state after the last whole update, and say where."""
        step = self.state.global_step
        if self.processes.count > 1 or step == 0:
            return "Checkpoints already saved are intact"
        self._save_checkpoint(self.model, None)
        return f"Saved checkpoint-{step}: resume_from_checkpoint=True (--resume) continues from there"

    def _finish(self, stated: dict[str, Any], about: dict[str, Any]) -> None:
        """Save the posterior in its best state, with a report; warn if training failed."""
        folder = Path(str(self.args.output_dir))
        looks = self.looks.take()
        kept_last = True
        if self.best is not None:
            certified = (folder / certificate.FILE).exists()
            end = [look.estimate for look in looks]
            sentence = None if certified else self.best.restore(end, self.state.global_step)
            if sentence is not None:
                kept_last, looks = False, self.looks.take()
                self._warn(sentence)
            self.best.forget()
        if self.looks.written != self.state.global_step or not kept_last:
            self.looks.write(self.state.global_step, looks)
        self.save_model()
        self.save_state()
        if self.is_world_process_zero():
            run.write(folder, stated, about, finished=True)
            write_report([folder])
            self.posterior.save_card(folder, self.looks.rows)
        self.processes.meet()  # the card has draws
        if (sentence := complaint([look.estimate for look in looks])) is not None:
            self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        if self.is_world_process_zero():
            logger.warning("%s", sentence)

    def _load_finished(self, folder: Path) -> TrainOutput:
        logger.warning("%s: this run is already finished; its posterior is loaded", folder)
        self.policy.load_adapter(folder)
        with checkpoints.reading(folder, checkpoints.STATE):
            self.state = TrainerState.load_from_json(str(folder / checkpoints.STATE))
        losses = [entry["train_loss"] for entry in self.state.log_history if "train_loss" in entry]
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.processes.meet()  # process 0 gathers what it saves

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        with replacing(folder, run.POSTERIOR) as part:
            if (folder / CARD).exists():
                shutil.copy(folder / CARD, part)  # an edited card is kept
            self.posterior.save_pretrained(part)
            (part / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # files of an interrupted save
        self.processes.meet()
        try:
            checkpoints.save_state(folder, self.processes.index, self.stores, self._log_z_values())
            if self.args.should_save:
                shutil.copy(Path(str(self.args.output_dir)) / run.FILE, folder)
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # This was the last file of each process. `Trainer` then writes trainer_state.json, which marks a checkpoint as
        # complete, and deletes checkpoints beyond save_total_limit.
        self.processes.meet()
        if self.args.should_save:
            checkpoints.seal(Path(output_dir), self.processes.count)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.policy.load_adapter(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        checkpoints.load_state(folder, self.processes.index, self.stores, self._log_z_values())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.processes.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, schedule = Path(output_dir), self.lr_scheduler
        checkpoints.save_optimizer(folder, self.processes.index, self.optimizer)
        if self.args.should_save and schedule is not None:
            torch.save(schedule.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint, "the state of optimizer and schedule"):
            schedule = self.lr_scheduler
            if self.processes.shards is None or checkpoint is None or schedule is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            checkpoints.load_optimizer(Path(checkpoint), self.processes.index, self.optimizer)
            schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _log_z_values(self) -> Tensor | None:
        return None if self.log_z is None else self.log_z.values
