"""Training settings: `transformers.TrainingArguments` with sixteen additional fields."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import timedelta
from typing import Any, Self

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils import is_in_notebook

from amortlm.errors import ConfigError, nearest
from amortlm.objectives import OBJECTIVES, parse
from amortlm.train.behaviour import CORRECTED, DEFAULT, POLICY, full_mix
from amortlm.train.renamed import refuse_renamed

AUTO = "auto"
LOCAL = "local"  # value of rollout
UPDATES = 200  # if neither max_steps nor num_train_epochs is given

# Fields of TrainingArguments that have no effect here, or a wrong one, and what to do instead.
_NO_PREDICTIONS = (
    "an evaluation diagnoses rows (eval_ess, eval_elbo, ..) and collects no predictions: leave it out"
)
_SHARDED = (
    "the policy also samples, which models sharded in this way cannot do: use torchrun, with one whole model per "
    "process, or with fsdp=True (docs/scale.md)"
)
_COMPILE = "the shapes of passes change with every batch of completions: leave it out"
_HUB = "trainer.posterior.push_to_hub('user/name') uploads the trained sampler: docs/publishing.md"
_FULL_EVAL = "an evaluation runs in the precision of the model: load it with the dtype you want"
_LIGER = "apply the kernels to lm.model before the trainer is made"
REFUSED = {
    "average_tokens_across_devices": "losses are means per trajectory, whatever the number of tokens: leave it out",
    "label_smoothing_factor": "there are no labels: use epsilon= and temperature_range= to explore",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "each pass chooses whether to use a cache: leave it out",
    "neftune_noise_alpha": "with noise in the embeddings the sampling policy differs from the trained one: "
    "use epsilon= and temperature_range= to explore",
    "include_num_input_tokens_seen": "tokens are sampled, not read from the data: the log has `length`",
    "per_device_eval_batch_size": "rows are diagnosed one at a time: leave it out",
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "parallelism_config": _SHARDED,
    "deepspeed": _SHARDED,
    "remove_unused_columns": "templates name the columns they use: leave it out",
    "label_names": "there are no labels: leave it out",
    "length_column_name": "rows are not grouped by length: leave it out",
    "do_predict": "sample from trainer.posterior",
    "resume_from_checkpoint": "pass it to trainer.train(resume_from_checkpoint=...)",
}
# Figures of an evaluation (means over rows, logged with the prefix "eval_") -> is higher better?
METRICS = {
    "ess": True,
    "elbo": True,
    "log_z": True,
    "log_reward": True,
    "valid": True,
    "log_w_variance": False,
}


@dataclass
class GFNConfig(TrainingArguments):
    """Arguments of `GFNTrainer`. One update uses `per_device_train_batch_size` prompts (times processes and
    accumulation steps), with `num_samples` completions each.

    Raises ConfigError for values that are wrong or do not fit together, for fields of TrainingArguments that have no
    meaning for `GFNTrainer` (`REFUSED`), and for settings of earlier versions.

    The paper's values are those of the next-sentence experiment of Hu et al. 2024 unless another is named. For why
    the defaults differ from them, see docs/training.md.
    """

    objective: str | dict[str, Any] = field(
        default=AUTO,
        metadata={
            "help": f"One of {', '.join(OBJECTIVES)}, or {{name: its settings}}, as in {{subtb: {{lam: 0.9}}}} "
            "(`amortlm.objectives`). auto: subtb, on four random states of each completion if text follows {z}; "
            "vargrad if only finished text is judged. Paper: subtb."
        },
    )
    num_samples: int = field(
        default=0,
        metadata={
            "help": "Completions per prompt (K). 0: 8, or as many as make 64 in an update of fewer than 8 prompts. "
            "Paper: 8; infilling 16."
        },
    )
    behaviour: dict[str, float] = field(
        default_factory=DEFAULT.copy,
        metadata={
            "help": "Shares of the prompts whose completions come from the policy, from the policy at a random "
            "temperature (tempered), from the buffer (replay), from the model before training with the policy's "
            "prompt (prior), or from importance resampling of policy and buffer, near the posterior (corrected). They "
            "sum to one. The default has prior: 0.125 where the support has a pattern, and completions are drawn here. "
            "Paper: {replay: 0.25, tempered: 0.5025}."
        },
    )
    corrected_method: str = field(
        default="sir",
        metadata={
            "help": "How completions are drawn for a correction: 'sir', or 'smc', which uses the rewards of prefixes. "
            "Paper: not used."
        },
    )
    corrected_particles: int = field(
        default=32,
        metadata={
            "help": "Completions drawn and scored for one corrected prompt of an update. Paper: not used."
        },
    )
    buffer_size: int = field(default=50, metadata={"help": "Completions kept per prompt. Paper: 50."})
    buffer_prioritized: bool = field(
        default=True, metadata={"help": "Draw from the buffer in proportion to reward. Paper: yes."}
    )
    temperature_range: tuple[float, float] = field(
        default=(0.5, 2.0),
        metadata={"help": "Range of the temperature of tempered prompts, uniform. Paper: 0.5 to 2."},
    )
    epsilon: float = field(default=0.0, metadata={"help": "Share of uniformly random tokens. Paper: 0."})
    reward_temperature: tuple[float, float, int] = field(
        default=(1.0, 1.0, 1),
        metadata={
            "help": "(start, end, steps): log R is divided by a temperature that moves linearly. Paper: 1.0 to 0.8 "
            "in 750 steps; infilling 1.1 to 0.85 in 100. Default: 1, since the target has its own temperature."
        },
    )
    narrow_support: bool = field(
        default=True,
        metadata={
            "help": "Take hard constraints (contains, matches, allowed_tokens, length) into the support, where it can "
            "state them: the posterior is the same, and every completion satisfies them. Paper: not used."
        },
    )
    hard_penalty: float = field(
        default=15.0,
        metadata={"help": "Cost of violating a hard constraint in training, in nats. Paper: not used."},
    )
    diagnose_steps: int = field(
        default=25,
        metadata={
            "help": "Number of updates between diagnoses of a few prompts (ESS, ELBO, samples); 0: never."
        },
    )
    rollout: str | list[str] = field(
        default=LOCAL,
        metadata={
            "help": "Where the policy's completions are drawn: local, or the address of a server, as in "
            "http://127.0.0.1:8000, or of several (docs/scale.md). Paper: local."
        },
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "By how many updates the weights that draw may be older than those that learn. So many updates "
            "ahead the server draws, while the policy is trained. 0: never ahead. Paper: not used."
        },
    )
    stop_at_gap: float = field(
        default=0.0,
        metadata={
            "help": "Stop, and save a certificate, when the smaller of KL(q||p) and KL(p||q) is at most this many nats "
            "on each diagnosed prompt; 0: never. Paper: not used."
        },
    )

    # Defaults of TrainingArguments that differ here. See docs/training.md.
    output_dir: str | None = field(default="runs/amortlm")
    learning_rate: float = 3e-4
    max_steps: int = field(
        default=-1, metadata={"help": "Updates; -1: given by num_train_epochs, or 200 if that is 0."}
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Passes through the data, instead of max_steps."}
    )
    warmup_steps: float = 10
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 5
    save_steps: float = 100
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    disable_tqdm: bool | None = None
    dataloader_pin_memory: bool = False
    ddp_timeout: int = field(
        default=600, metadata={"help": "Seconds that processes wait for a late process before all end."}
    )

    def __new__(cls, *args: Any, **given: Any) -> Self:
        refuse_renamed(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not (sys.stderr.isatty() or is_in_notebook())
        self.temperature_range = tuple(self.temperature_range)  # type: ignore[assignment]
        self.reward_temperature = tuple(self.reward_temperature)  # type: ignore[assignment]
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) is False:
                setattr(self, name, "no")  # YAML 1.1 reads a bare `no` as False
        if self.data_seed is None:
            self.data_seed = self.seed  # otherwise the order of the data depends on the global random state
        self._check_inherited()
        if self.max_steps == -1 and self.num_train_epochs == 0:
            self.max_steps = UPDATES
        self._choose_metric()
        self._check()
        if self.use_cpu:
            # Starts the process group, because TrainingArguments ignores ddp_timeout on a CPU.
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        try:
            super().__post_init__()
        except (ValueError, ImportError) as e:
            raise ConfigError(f"training arguments: {e}") from e
        if self.fp16 and self.device.type == "cpu":
            raise ConfigError("fp16 needs a GPU: set bf16, or neither")

    @property
    def n_gpu(self) -> int:
        """At most 1, because nn.DataParallel cannot split rollouts: for several GPUs use torchrun."""
        return min(1, super().n_gpu)

    def _check_inherited(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in REFUSED and (value or None) != (_default(f) or None):
                raise ConfigError(f"{f.name}={value!r} has no use here: {REFUSED[f.name]}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f"train_sampling_strategy is 'random' or 'sequential', not {self.train_sampling_strategy!r}: samples "
                "have no length before they are sampled"
            )
        whole = self.max_steps == -1 or (self.max_steps >= 1 and self.max_steps % 1 == 0)
        if not whole or self.num_train_epochs < 0:
            raise ConfigError(
                f"max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs}: give a whole number of updates "
                "of at least 1, or epochs above 0 (a posterior can be used and saved without training)"
            )
        if self.max_steps > 0 and self.num_train_epochs > 0:
            raise ConfigError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs}: give one of them"
            )

    def _choose_metric(self) -> None:
        """Set metric_for_best_model and greater_is_better if another setting needs them."""
        needed = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None:
            if not (needed or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")):
                return
            self.metric_for_best_model = "elbo"
        name = self.metric_for_best_model.removeprefix("eval_")
        if name not in METRICS:
            raise ConfigError(
                f"metric_for_best_model={self.metric_for_best_model!r}: {nearest(name, METRICS)}"
            )
        if self.greater_is_better is None:
            self.greater_is_better = METRICS[name]

    def _check(self) -> None:
        self.check_objective()
        if self.max_staleness < 0 or (self.max_staleness and self.rollout == LOCAL):
            raise ConfigError(
                f"max_staleness={self.max_staleness}: a number of updates, 0 or more, for a server (rollout=...)"
            )
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"epsilon must lie in [0, 1], got {self.epsilon}")
        if self.corrected_method not in ("sir", "smc"):
            raise ConfigError(f"corrected_method is 'sir' or 'smc', not {self.corrected_method!r}")
        if self.corrected_particles < 1 or (self.behaviour[CORRECTED] > 0 and self.num_samples == 1):
            raise ConfigError("corrected samples need corrected_particles >= 1 and num_samples >= 2")
        if self.stop_at_gap < 0 or (self.stop_at_gap > 0 and self.diagnose_steps < 1):
            raise ConfigError(
                f"stop_at_gap={self.stop_at_gap}: give a number of nats above 0 (0: never), and diagnose_steps of at "
                "least 1"
            )
        low, high = self.temperature_range
        start, end, steps = self.reward_temperature
        if not 0 < low <= high or start <= 0 or end <= 0 or steps < 1:
            raise ConfigError(
                "temperatures must be positive, temperature_range must be ordered, and the reward_temperature schedule "
                "must have at least one step"
            )

    def check_objective(self) -> None:
        """Write objective and behaviour in their full form. Raises ConfigError if they do not fit together."""
        mix = self.behaviour = full_mix(self.behaviour)
        if self.num_samples < 0:
            raise ConfigError(
                f"num_samples={self.num_samples}: give a number of completions, or 0 to have it chosen"
            )
        if self.objective == AUTO:
            return
        objective = parse(self.objective)
        self.objective = objective.stated
        if 0 < self.num_samples < objective.min_samples:
            learned = f", or objective={{{objective.name!r}: {{'log_z': 'learned'}}}}"
            raise ConfigError(
                f"objective {objective.name!r} compares samples of one prompt: num_samples must be at least "
                f"{objective.min_samples}{learned if hasattr(objective, 'log_z') else ''}"
            )
        used = {**mix, "epsilon": self.epsilon, "max_staleness": self.max_staleness}
        if off := [name for name in objective.biased_by if used[name] > 0]:
            fit = {k: v for k, v in mix.items() if v and k not in (*off, POLICY)} or {POLICY: 1.0}
            raise ConfigError(
                f"objective {objective.name!r} is biased by samples that are not drawn from the policy itself "
                f"({', '.join(off)}): write behaviour={fit!r}, epsilon=0 and max_staleness=0 (corrected prompts "
                "use the buffer with the right weights)"
            )

    def reward_temperature_at(self, step: int) -> float:
        """Divisor of log R at an update: linear from start to end, then constant."""
        start, end, steps = self.reward_temperature
        return start + (end - start) * min(1.0, step / steps)


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()
