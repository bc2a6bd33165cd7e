"""GFNTrainer: GFlowNet fine-tuning on top of `transformers.Trainer`.

prompts -> source.collect (draw, score, store) -> experience -> policy.evaluate -> log_weights -> objective
"""

from __future__ import annotations

import logging
import time
from collections import UserList
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import speed_metrics

from amortlm import objectives
from amortlm.buffer import ReplayBuffer
from amortlm.data import as_rows, check_rows
from amortlm.engine.adapter import FULL
from amortlm.errors import ConfigError, DataError, RewardError, TrainingError
from amortlm.language_model import LanguageModel
from amortlm.policy.policy import Policy
from amortlm.posterior import Posterior
from amortlm.rollout import HTTPSampler
from amortlm.support.spec import Support
from amortlm.targets.base import Softened, Target
from amortlm.targets.narrow import narrow
from amortlm.text.template import Messages
from amortlm.train import run, sharding, trackers
from amortlm.train.callbacks import DiagnoseCallback, StopWhenRight, TrainingProgress
from amortlm.train.checkpoints import Store
from amortlm.train.config import LOCAL, METRICS, REFUSED, GFNConfig
from amortlm.train.defaults import settled
from amortlm.train.floor import FloorCheck
from amortlm.train.log_z import LearnedLogZ
from amortlm.train.looks import DRAWS, Look, Looks, diagnosis_seed, mean
from amortlm.train.memory import RewardMemory
from amortlm.train.metrics import Metrics
from amortlm.train.outcome import KeepBest
from amortlm.train.processes import Processes
from amortlm.train.renamed import refuse_keywords
from amortlm.train.resumable import ResumableTrainer
from amortlm.train.source import Experience, ExperienceSource
from amortlm.train.twins import twins
from amortlm.train.upcoming import Upcoming
from amortlm.types import DataRow, PolicyLogProbs, Row

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
CHUNK = 32  # rows at a time when every row of the data is visited
# Arguments of Trainer that have the same meaning here.
TRAINER = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")


class GFNTrainer(ResumableTrainer):
    """Trains a policy to sample from `target` (Hu et al. 2024, section 3).

    train_dataset   rows with the columns the templates name: a list of dicts, a `datasets.Dataset`, a DataFrame
    adapter         a LoraConfig or other PEFT config, the rank of a LoRA on all linear layers (None: the default rank),
                    "full" to train all weights, or a folder with a saved adapter to start from
    gold            initial completions of the replay buffer: a list per row (texts or tokens)
    eval_dataset    rows that are diagnosed instead of training rows: the first few every `diagnose_steps`, and all in
                    `evaluate`, which `eval_strategy` calls

    `trainer.posterior` is usable before, during and after training. Everything else is as in `transformers.Trainer`:
    callbacks, optimizers, trackers, checkpoints, `torchrun`.

    Raises ConfigError for arguments that do not fit, RewardError for an objective that needs every prefix with a target
    that judges only finished text, and DataError, TemplateError or PromptTooLongError for rows that do not fit.
    """

    objective: objectives.Objective

    def __init__(
        self,
        lm: LanguageModel,
        *,
        target: Target,
        prompt: str | Messages,
        support: Support,
        train_dataset: Sequence[Row],
        args: GFNConfig | None = None,
        adapter: LoraConfig | int | str | Path | None = None,
        gold: Sequence[Sequence[str | list[int]]] | None = None,
        eval_dataset: Sequence[Row] | None = None,
        **kwargs: Any,
    ):
        args = args or GFNConfig()
        _check_kinds(lm, target, support, args)
        _check_arguments(args, kwargs, eval_dataset)
        self.target = target.bind(lm)
        support, narrowed = narrow(support, self.target, lm) if args.narrow_support else (support, [])
        set_seed(args.seed)
        self.lm, self.policy = lm, Policy(lm, prompt, support, adapter)
        rows = self._checked_rows(train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else self._checked_rows(eval_dataset, "eval_dataset")
        args, chosen = settled(args, len(rows), self.target, self.policy.support)
        self.chosen = [*narrowed, *chosen]
        for sentence in self.chosen:
            logger.info("chosen: %s", sentence)
        self.objective = objectives.parse(args.objective)
        _check_objective(self.objective, self.target)
        self._note_first_weights(adapter)
        self._begin_processes(args)
        self._make_parts(
            args, rows, Softened(self.target, lm.log_prob("{z}", given=prompt), args.hard_penalty)
        )
        super().__init__(
            model=self.policy,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=_collate,
            **kwargs,
        )
        self._check_processes(rows)
        self._warn_of_twins(rows)
        self.loss_is_scaled_for_ga = False
        self._choose_callbacks(rows if held_out is None else held_out)
        if gold is not None:
            self.add_gold(rows, gold)
        self.gold = gold

    def _note_first_weights(self, adapter: LoraConfig | int | str | Path | None) -> None:
        if isinstance(adapter, str | Path) and adapter != FULL:
            trained = [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]
            self.first_weights = run.name_of(trained)

    def _begin_processes(self, args: GFNConfig) -> None:
        self.processes = Processes(args)
        if not sharding.is_asked(args):
            return
        self.whole_weights = run.name_of(self.lm.model.named_parameters())  # read while they are whole
        names = (self.whole_weights, run.name_of(self.policy.model.named_parameters()))
        sharding.shard(args, self.policy, self.processes, names)

    def create_accelerator_and_postprocess(self) -> None:
        with sharding.unseen(self.args):
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.processes.shards is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.processes.shards is None:
            return super()._wrap_model(model, *args, **kwargs)
        return (
            model if isinstance(model, sharding.Wrapped) else sharding.Wrapped(self.policy, self.accelerator)
        )

    def _make_parts(self, args: GFNConfig, rows: Sequence[Row], target: Target) -> None:
        """Create the parts that an update uses. target: with finite rewards."""
        self.training_target = RewardMemory(target)
        self.posterior = Posterior(self.policy, self.target)
        self.buffer = ReplayBuffer(args.buffer_size, args.buffer_prioritized)
        self.stores: tuple[Store, ...] = (self.buffer, self.training_target)
        server = None if args.rollout == LOCAL else HTTPSampler(args.rollout, self.policy)
        if server is not None:
            self.stores = (*self.stores, server.ahead)
        self.source = ExperienceSource(
            self.policy, self.training_target, self.buffer, self.objective, args, rows, server
        )
        self.floor = FloorCheck(self.policy.support)
        self._metrics = Metrics()
        self._micro_step = (-1, 0)
        self._rows_to_come: Upcoming | None = None
        rate = self.objective.log_z_rate
        self.log_z = None if rate is None else LearnedLogZ(self.policy, rows, rate)
        if self.log_z is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # log Z is not used in the forward pass, only in the loss

    def _check_processes(self, rows: Sequence[Row]) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(f"accelerate launch with DeepSpeed or another sharding: {REFUSED['deepspeed']}")
        batch = self.args.train_batch_size * self.processes.count
        if self.args.dataloader_drop_last and len(rows) < batch:
            raise ConfigError(f"dataloader_drop_last with batches of {batch} drops all {len(rows)} rows")
        if self.processes.shards is None:
            self.lm.model.to(self.args.device)

    def _warn_of_twins(self, rows: Sequence[Row]) -> None:
        found = twins(rows, self.policy.prompt.columns, self.target.columns)
        if found is not None and self.is_world_process_zero():
            logger.warning("%s", found)

    def _choose_callbacks(self, diagnosed: Sequence[Row]) -> None:
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        if not self.args.disable_tqdm:
            self.add_callback(TrainingProgress())
        self.best = None
        self.looks = Looks(self.posterior, diagnosed, self.processes, self.args)
        if self.args.diagnose_steps:
            stop = None
            if not self.args.load_best_model_at_end:
                self.best = KeepBest(self.policy, Path(str(self.args.output_dir)), self.processes)
            if self.args.stop_at_gap:
                stop = StopWhenRight(
                    self.posterior, self.train_dataset, self.buffer, self.args, self.processes, self.log
                )
            self.add_callback(DiagnoseCallback(self.looks, self.log, self._show, self.best, stop))

    def _show(self, step: int, looks: Sequence[Look]) -> None:
        if self.is_world_process_zero():
            found = trackers.lines(self.looks.rows, looks)
            trackers.show(self.args, self.callback_handler.callbacks, step, found)

    def _checked_rows(self, rows: Sequence[Row], name: str) -> list[Row]:
        """Copies of the rows, after a check of columns and prompts: an error comes before training, not at step 500."""
        copies: list[Row] = [DataRow(row) for row in as_rows(rows, name)]
        check_rows(copies, set(self.policy.prompt.columns) | set(self.target.columns), name)
        for start in range(0, len(copies), CHUNK):
            self.policy.encode_rows(copies[start : start + CHUNK])
        return copies

    def add_gold(self, rows: Sequence[Row], gold: Sequence[Sequence[str | list[int]]]) -> None:
        """Score gold completions (a list per row) and add them to the replay buffer. Raises DataError if there is not
        one list per row, or for a completion outside the support."""
        if len(rows) != len(gold):
            raise DataError(
                f"{len(gold)} lists of gold completions for {len(rows)} rows; give one list per row"
            )
        for start in range(0, len(rows), CHUNK):
            self.source.add_gold(rows[start : start + CHUNK], gold[start : start + CHUNK])

    # One update

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.processes.blaming():
            loss = super().training_step(*args, **kwargs)
            if self.processes.shards is not None and self.log_z is not None:
                # Nobody averages its gradient, as DDP would. The mean of what was averaged before is itself.
                sharding.average_gradient(self.policy.log_z, self.processes)
            return loss

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Experience:  # type: ignore[override]
        """The experience for `compute_loss`, from a micro-batch of rows."""
        step = self._next_micro_step()
        if step[1] == 0:
            self.source.begin(step[0], self._upcoming)
        experience = self.source.collect(list(inputs["rows"]), step)
        self.floor.see(experience.rollouts, experience.log_reward)
        self.processes.meet()
        return experience

    def _upcoming(self, update: int) -> list[list[Row]]:
        """The micro-batches of an update to come; none after the last."""
        if update >= self.state.max_steps:
            return []
        if self._rows_to_come is None:
            self._rows_to_come = Upcoming(
                self.get_train_dataloader(), self.train_dataset, self.args.gradient_accumulation_steps
            )
        return self._rows_to_come.update(update)

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: Experience,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        rollouts = inputs.rollouts
        distinct, place = rollouts.distinct()
        log_probs = model(distinct).select(place)
        log_reward = inputs.log_reward / self.args.reward_temperature_at(self.state.global_step)
        log_w = objectives.log_weights(log_reward, log_probs, rollouts.stop_mask)
        loss, metrics = self._objective(log_w, inputs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower learning_rate or hard_penalty; "
                "checkpoints already saved are intact"
            )
        self._record(metrics, log_w, log_probs, inputs)
        return (loss, log_w) if return_outputs else loss

    def _objective(self, log_w: Tensor, experience: Experience) -> objectives.Loss:
        rollouts = experience.rollouts
        log_z = None if self.log_z is None else self.log_z.of(rollouts.rows)
        return self.objective.loss(
            objectives.LossInputs(
                log_w, rollouts.stop_mask, rollouts.row_index, log_z, experience.from_posterior
            )
        )

    def _next_micro_step(self) -> tuple[int, int]:
        step, micro = self._micro_step
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, micro)
        return self._micro_step

    @torch.no_grad()
    def _record(
        self, metrics: dict[str, float], log_w: Tensor, log_probs: PolicyLogProbs, experience: Experience
    ) -> None:
        rollouts = experience.rollouts
        if self.args.num_samples > 1:
            spread = objectives.spread(log_w, rollouts.stop_mask, rollouts.row_index)
            metrics = {**spread, **metrics}
        metrics["length"] = rollouts.lengths.float().mean().item()
        metrics["buffer"] = float(len(self.buffer))
        if self.args.max_staleness:
            metrics["staleness"] = float(self.state.global_step - experience.version)
        self._metrics.add(metrics | experience.mismatch(log_probs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, of all processes, to the log of the loss."""
        if "loss" in logs:
            super().log({**logs, **self._metrics.take(self.processes)}, start_time)
        else:
            # Trainer treats any log as the log of the loss, and would then skip that one.
            due = self.control.should_log
            super().log(logs, start_time)
            self.control.should_log = due

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.log_z is not None:
            self.log_z.give_to(optimizer)
        return optimizer

    # Evaluation

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Sequence[Row] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Diagnose every row of `eval_dataset` (default: the trainer's) from fresh samples, and log the means.

        Returns eval_ess, eval_elbo, eval_log_z, eval_log_reward, eval_valid and eval_log_w_variance
        (`ImportanceEstimate`, nats). In several processes, all must call it. Raises DataError without rows.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise DataError("evaluate() has no rows: give it some, or eval_dataset to the trainer")
        rows = self.eval_dataset if eval_dataset is None else self._checked_rows(eval_dataset, "eval_dataset")
        start, seed = time.time(), diagnosis_seed(self.args)
        found = self.processes.share(lambda row: self.posterior.estimate(row, DRAWS, seed=seed), rows)
        metrics = {f"{metric_key_prefix}_{name}": mean(found, name) for name in METRICS}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("a GFNTrainer predicts no labels: use trainer.posterior (sample, predict, vote)")

    def _load_best_model(self) -> None:
        self.policy.load_adapter(str(self.state.best_model_checkpoint))


def _collate(rows: list[Row]) -> dict[str, UserList[Row]]:
    # accelerate would copy the rows of a plain list, to move their contents to the device.
    return {"rows": UserList(rows)}


def _check_kinds(lm: object, target: object, support: object, args: object) -> None:
    """Raise ConfigError for a name of a model, a function or a dict where another object is needed."""
    for name, value, kind, remedy in (
        ("lm", lm, LanguageModel, "LanguageModel.from_pretrained(...)"),
        (
            "target",
            target,
            Target,
            'terms such as lm.log_prob("{z}", given="{x}"); verifier(fn) for a function',
        ),
        ("support", support, Support, 'Support(stop=".", max_tokens=20)'),
        ("args", args, GFNConfig, "GFNConfig(...), which also has the fields of TrainingArguments"),
    ):
        if not isinstance(value, kind):
            raise ConfigError(f"{name} is a {type(value).__name__}, not a {kind.__name__}: give {remedy}")


def _check_arguments(args: GFNConfig, kwargs: Mapping[str, Any], eval_dataset: Any) -> None:
    refuse_keywords(kwargs, {"peft_config": "adapter", "seeds": "gold"})
    for name in kwargs.keys() - set(TRAINER):
        raise ConfigError(f"GFNTrainer takes no {name}; of Trainer it takes {', '.join(TRAINER)}")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError("eval_strategy needs rows: give eval_dataset")


def _check_objective(objective: objectives.Objective, target: Target) -> None:
    if objective.every_prefix and not target.every_prefix:
        names = [repr(term) for _, term in target.terms if not term.every_prefix]
        others = [repr(name) for name, other in objectives.OBJECTIVES.items() if not other.every_prefix]
        raise RewardError(
            f"objective {objective.name!r} compares the rewards of all prefixes, but these terms judge only finished "
            f"text: {', '.join(names)}. Use objective={' or '.join(others)}, or verifier(fn, every_prefix=True)"
        )
