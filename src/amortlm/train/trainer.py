"""GFNTrainer: GFlowNet fine-tuning on top of `transformers.Trainer`.

prompts -> source.collect -> target.score -> buffer -> policy.evaluate -> log_weights -> objective
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerState, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput, speed_metrics

from amortlm import objectives
from amortlm.buffer import ReplayBuffer
from amortlm.data import as_rows, check_rows
from amortlm.engine.adapter import FULL
from amortlm.errors import AmortLMError, ConfigError, DataError, RewardError
from amortlm.files import replacing
from amortlm.language_model import LanguageModel
from amortlm.policy.policy import Policy
from amortlm.posterior import Posterior
from amortlm.seeds import seed_of
from amortlm.support.spec import Support
from amortlm.targets.base import Softened, Target
from amortlm.text.template import Messages
from amortlm.train import checkpoints, run
from amortlm.train.callbacks import ROWS, SAMPLES, DiagnoseCallback, TrainingProgress, diagnosis_seed, mean
from amortlm.train.config import METRICS, REFUSED, GFNConfig
from amortlm.train.interruption import Interruption
from amortlm.train.memory import RewardMemory
from amortlm.train.outcome import complaint
from amortlm.train.processes import Processes
from amortlm.train.source import TrajectorySource
from amortlm.types import Rollouts, Row, row_key

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
CARD = "README.md"
CHUNK = 32  # rows at a time when every row of the data is visited
# Arguments of Trainer that mean the same here.
TRAINER = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")


class GFNTrainer(Trainer):
    """Trains a policy to sample from `target` (Hu et al. 2024, section 3).

    train_dataset   rows with the columns the templates name: a list of dicts, a `datasets.Dataset`, a DataFrame
    peft_config     a LoraConfig, "full" for full fine-tuning, or None for LoRA on all linear layers
    seeds           gold completions that start in the replay buffer: a list per row (texts or tokens)
    eval_dataset    rows that are diagnosed in place of the first ones trained on: a few every `diagnose_steps`, and
                    all in `evaluate`, which `eval_strategy` calls

    `trainer.posterior` is usable before, during and after training. Everything else is `transformers.Trainer`:
    callbacks, optimizers, trackers, checkpoints, `torchrun`.
    """

    args: GFNConfig
    train_dataset: Any  # a list of rows
    eval_dataset: Any  # a list of rows, or None

    def __init__(
        self,
        lm: LanguageModel,
        *,
        target: Target,
        prompt: str | Messages,
        support: Support,
        train_dataset: Sequence[Row],
        args: GFNConfig | None = None,
        peft_config: LoraConfig | str | None = None,
        seeds: Sequence[Sequence[str | list[int]]] | None = None,
        eval_dataset: Sequence[Row] | None = None,
        **kwargs: Any,
    ):
        args = args or GFNConfig()
        for name in kwargs.keys() - set(TRAINER):
            raise ConfigError(f"GFNTrainer takes no {name}; of Trainer it takes {', '.join(TRAINER)}")
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError("eval_strategy needs rows: give eval_dataset")
        target = target.bind(lm)
        _check_objective(args.objective, target)
        set_seed(args.seed)
        policy = Policy(lm, prompt, support, peft_config)
        self.lm, self.target, self.policy = lm, target, policy
        rows = self._checked_rows(train_dataset, "train_dataset")
        diagnosed = rows if eval_dataset is None else self._checked_rows(eval_dataset, "eval_dataset")
        self._seeds = seeds
        trained = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
        given = isinstance(peft_config, str | Path) and peft_config != FULL
        self._start = run.name_of(trained) if given else None
        softened = Softened(target, lm.log_prob("{z}", given=prompt), args.hard_penalty)
        self.training_target = RewardMemory(softened)
        self.posterior = Posterior(policy, target)
        self.buffer = ReplayBuffer(args.buffer_size, args.buffer_prioritized)
        self._stores = (self.buffer, self.training_target)
        self.source = TrajectorySource(policy, self.training_target, self.buffer, args)
        self._row_number = {row_key(row): i for i, row in enumerate(rows)}
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._micro_step = (-1, 0)
        if self._learns_log_z(args):
            policy.log_z = torch.nn.Parameter(torch.full((len(rows),), torch.nan))
            if args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = False  # by the forward pass, which log Z is no part of

        super().__init__(
            model=policy,
            args=args,
            train_dataset=rows,
            eval_dataset=None if eval_dataset is None else diagnosed,
            data_collator=_collate,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(f"accelerate launch with FSDP or DeepSpeed: {REFUSED['fsdp']}")
        self.processes = Processes(args)
        batch = args.train_batch_size * self.processes.count
        if args.dataloader_drop_last and len(rows) < batch:
            raise ConfigError(
                f"dataloader_drop_last leaves nothing of {len(rows)} rows in batches of {batch}"
            )
        lm.model.to(args.device)
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        if not args.disable_tqdm:
            self.add_callback(TrainingProgress())
        if args.diagnose_steps:
            self.add_callback(DiagnoseCallback(self, diagnosed, rows))
        if seeds is not None:
            self.seed_buffer(rows, seeds)

    def _checked_rows(self, rows: Sequence[Row], name: str) -> list[Row]:
        """Copies of the rows. Prompts that are too long fail here, not at step 500."""
        copies: list[Row] = [*as_rows(rows, name)]
        check_rows(copies, set(self.policy.prompt.columns) | set(self.target.columns), name)
        for start in range(0, len(copies), CHUNK):
            self.policy.encode_rows(copies[start : start + CHUNK])
        return copies

    # One update

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.processes.blaming():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = inputs["rows"]
        rollouts = self._thin(self.source.collect(rows, self._next_micro_step()))
        distinct, place = rollouts.distinct()  # samples of a sharp policy repeat
        log_reward = self.training_target.score(distinct)[place]
        self.buffer.add(rollouts, log_reward.gather(1, rollouts.lengths[:, None]).squeeze(1))
        self.processes.meet()
        log_probs = model(distinct).select(place)
        log_reward = log_reward / self.args.reward_temperature_at(self.state.global_step)
        log_w = objectives.log_weights(log_reward, log_probs, rollouts.stop_mask)
        loss, metrics = self._objective(log_w, rollouts)
        if not torch.isfinite(loss):
            raise AmortLMError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower learning_rate or hard_penalty; "
                "checkpoints already saved are intact"
            )
        self._record(metrics, log_w, rollouts)
        return (loss, log_w) if return_outputs else loss

    def _objective(self, log_w: Tensor, rollouts: Rollouts) -> objectives.Loss:
        mask, group = rollouts.stop_mask, rollouts.row_index
        log_z = None
        if self._learns_log_z(self.args):
            log_z = self.policy.log_z[[self._row_number[row_key(row)] for row in rollouts.rows]]
        match self.args.objective:
            case "tb":
                return objectives.tb(log_w, mask, group, log_z)
            case "vargrad":
                return objectives.vargrad(log_w, mask, group)
            case "forward_kl":
                corrected = self.source.corrected(rollouts.rows, self._micro_step).to(mask.device)
                return objectives.forward_kl(log_w, mask, group, corrected)
        log_w, mask = objectives.with_root(log_w, mask, group, log_z)
        if self.args.objective == "db":
            return objectives.db(log_w, mask)
        return objectives.subtb(log_w, mask, self.args.subtb_lambda)

    def _thin(self, rollouts: Rollouts) -> Rollouts:
        """Drop the stopping states that this objective will not look at, before they are scored."""
        if self.args.objective not in objectives.EVERY_PREFIX_OBJECTIVES:
            return rollouts.final_only()
        if self.args.subtb_states is None:
            return rollouts
        generator = torch.Generator().manual_seed(seed_of((self.args.seed, "states", self._micro_step)))
        kept = objectives.subsample_states(rollouts.stop_mask, self.args.subtb_states, generator)
        return replace(rollouts, stop_mask=kept)

    def _next_micro_step(self) -> tuple[int, int]:
        step, micro = self._micro_step
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, micro)
        return self._micro_step

    @torch.no_grad()
    def _record(self, metrics: dict[str, float], log_w: Tensor, rollouts: Rollouts) -> None:
        final = objectives.final_log_w(log_w, rollouts.stop_mask)
        if self.args.num_samples > 1:
            one_state = torch.ones(len(final), 1, dtype=torch.bool, device=final.device)
            variance, more = objectives.vargrad(final[:, None], one_state, rollouts.row_index)
            metrics = {**more, **metrics, "log_w_variance": variance.item()}
        metrics["length"] = rollouts.lengths.float().mean().item()
        metrics["buffer"] = float(len(self.buffer))
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of our metrics since the last log, over all processes, to that of the loss."""
        if "loss" in logs:
            own = {name: sum(v) / len(v) for name, v in self._metrics.items()}
            everyone = self.processes.gather(own)
            logs = {**logs, **{name: sum(m[name] for m in everyone) / len(everyone) for name in own}}
            self._metrics.clear()
            super().log(logs, start_time)
        else:
            # Trainer takes any log for that of the loss, which would then be left out.
            due = self.control.should_log
            super().log(logs, start_time)
            self.control.should_log = due

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
        start, seed = time.time(), diagnosis_seed(self)
        found = self.processes.share(lambda row: self.posterior.estimate(row, SAMPLES, seed=seed), rows)
        metrics = {f"{metric_key_prefix}_{name}": mean(found, name) for name in METRICS}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("a GFNTrainer predicts no labels: use trainer.posterior (sample, predict, vote)")

    def _load_best_model(self) -> None:
        self.policy.load_adapter(str(self.state.best_model_checkpoint))

    # Buffer and log Z

    def seed_buffer(self, rows: Sequence[Row], completions: Sequence[Sequence[str | list[int]]]) -> None:
        """Score gold completions (a list per row) and put them into the replay buffer."""
        if len(rows) != len(completions):
            raise DataError(
                f"{len(completions)} lists of gold completions for {len(rows)} rows; give one list per row"
            )
        for start in range(0, len(rows), CHUNK):
            part = completions[start : start + CHUNK]
            if any(part):
                rollouts = self.policy.rollouts(rows[start : start + CHUNK], part)
                self.buffer.add(rollouts, self.training_target.score_final(rollouts))

    @staticmethod
    def _learns_log_z(args: GFNConfig) -> bool:
        return args.objective not in objectives.GROUP_OBJECTIVES and args.log_z == "learned"

    @torch.no_grad()
    def _start_log_z(self) -> None:
        """Start each learned log Z at the mean log weight of samples: zero can be hundreds of nats off."""
        log_z = self.policy.log_z
        for start in range(0, len(log_z), CHUNK):
            rows = self.train_dataset[start : start + CHUNK]
            rollouts, log_probs = self.policy.sample(
                rows, self.args.num_samples, seed=(self.args.seed, "log_z")
            )
            log_reward = self.training_target.score_final(rollouts)
            log_w = log_reward / self.args.reward_temperature_at(0) - log_probs.final(rollouts.lengths)
            log_z[start : start + CHUNK] = log_w.view(len(rows), -1).mean(1)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._learns_log_z(self.args):
            log_z = self.policy.log_z
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not log_z]
            optimizer.add_param_group(
                {"params": [log_z], "lr": self.args.log_z_learning_rate, "weight_decay": 0.0}
            )
        return optimizer

    # Running, saving and resuming

    def train(  # type: ignore[override]
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        overwrite_output_dir: bool = False,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, then save the posterior into `args.output_dir`, whatever `save_strategy` says of checkpoints.

        resume_from_checkpoint: a checkpoint folder, or True for the last one in `output_dir` that is whole. A run that
        was interrupted and resumed gives the same numbers as one that was not. overwrite_output_dir: delete the run
        that `output_dir` holds. Without either, a folder with checkpoints or a posterior is refused.

        SIGINT, SIGTERM and SIGHUP have their effect (KeyboardInterrupt, the end of the process) after the step that
        runs, and a checkpoint. Raises CheckpointError for a folder that is used or of another run, checkpoints that
        are damaged, and a full disk.
        """
        folder = Path(str(self.args.output_dir))
        stated = run.identity(
            self.policy, self.target, self.train_dataset, self.args, start=self._start, seeds=self._seeds
        )
        with ExitStack() as held, Interruption(self.args) as stop, checkpoints.writing(folder):

            def claim() -> Path | None:
                held.enter_context(run.locked(folder))
                return run.prepare(folder, stated, resume_from_checkpoint or False, overwrite_output_dir)

            found = self._agreed(claim)
            if found is not None and self._is_over(found):
                output = self._load_finished(found)
            else:
                output = self._run(None if found is None else str(found), stop, kwargs)
            if stop.saved is None and found != folder:
                self._finish(stated)
        stop.deliver()
        return output

    def _run(self, found: str | None, stop: Interruption, kwargs: dict[str, Any]) -> TrainOutput:
        if self._learns_log_z(self.args) and found is None:
            self._start_log_z()
        self.add_callback(stop)
        try:
            return super().train(resume_from_checkpoint=found, **kwargs)
        finally:
            self.remove_callback(stop)

    def _finish(self, stated: dict[str, Any]) -> None:
        """Save the posterior, and say where it came to nothing."""
        folder = Path(str(self.args.output_dir))
        self.save_model()
        self.save_state()
        if self.is_world_process_zero():
            run.write(folder, stated, finished=True)
        diagnosed = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        n = SAMPLES if self.args.diagnose_steps else self.args.num_samples
        end = self.processes.share(
            lambda row: self.posterior.estimate(row, n, seed=diagnosis_seed(self)), diagnosed[:ROWS]
        )
        start = next((e for e in self.state.log_history if "elbo" in e and e["step"] == 0), None)
        if (sentence := complaint(start, end)) is not None and self.is_world_process_zero():
            logger.warning("%s", sentence)

    def _agreed(self, find: Callable[[], T]) -> T:
        """What the first process finds, or the error that it meets, for all of them."""
        found: Any = None
        error: Exception | None = None
        if self.is_world_process_zero():
            try:
                found = find()
            except (AmortLMError, OSError) as e:
                error = e
        found, error = self.processes.gather((found, error))[0]
        if error is not None:
            raise error
        return found

    def _is_over(self, folder: Path) -> bool:
        """Was training at its end here? `Trainer` would go on for a step."""
        if folder == Path(str(self.args.output_dir)):
            return True
        with checkpoints.reading(folder, checkpoints.STATE):
            control = json.loads((folder / checkpoints.STATE).read_text(encoding="utf-8"))[
                "stateful_callbacks"
            ]["TrainerControl"]
            return bool(control["args"]["should_training_stop"])

    def _load_finished(self, folder: Path) -> TrainOutput:
        logger.warning("%s: training was finished; nothing is left to do", folder)
        self.policy.load_adapter(folder)
        with checkpoints.reading(folder, checkpoints.STATE):
            self.state = TrainerState.load_from_json(str(folder / checkpoints.STATE))
        losses = [entry["train_loss"] for entry in self.state.log_history if "train_loss" in entry]
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, {})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        with replacing(folder, run.POSTERIOR) as part:
            if (folder / CARD).exists():
                shutil.copy(folder / CARD, part)  # peft adds to a card that is there
            self.posterior.save_pretrained(part)
            (part / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # files of a save that was cut short
        self.processes.meet()
        try:
            checkpoints.save_state(folder, self.processes.index, self._stores, self._log_z())
            if self.args.should_save:
                shutil.copy(Path(str(self.args.output_dir)) / run.FILE, folder)
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # That was each process's last file. What follows: trainer_state.json, without which a checkpoint was cut
        # short, and the end of checkpoints beyond save_total_limit.
        self.processes.meet()
        if self.args.should_save:
            checkpoints.seal(Path(output_dir), self.processes.count)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.policy.load_adapter(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        checkpoints.load_state(folder, self.processes.index, self._stores, self._log_z())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint, "the state of optimizer and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _log_z(self) -> Tensor | None:
        return self.policy.log_z.data if self._learns_log_z(self.args) else None


def _collate(rows: list[Row]) -> dict[str, list[Row]]:
    return {"rows": rows}


def _check_objective(objective: str, target: Target) -> None:
    if objective in objectives.EVERY_PREFIX_OBJECTIVES and not target.every_prefix:
        names = [repr(term) for _, term in target.terms if not term.every_prefix]
        raise RewardError(
            f"objective {objective!r} compares the rewards of all prefixes, but these terms judge only finished text: "
            f"{', '.join(names)}. Use objective='vargrad' or 'tb', or verifier(fn, every_prefix=True)"
        )
