"""Training settings: `transformers.TrainingArguments` and nineteen fields of our own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from transformers import TrainingArguments

from amortlm.errors import ConfigError, nearest
from amortlm.objectives import GROUP_OBJECTIVES, OBJECTIVES


@dataclass
class GFNConfig(TrainingArguments):
    """Arguments of `GFNTrainer`. One update sees `per_device_train_batch_size` prompts (times processes and
    accumulation steps), with `num_samples` completions each.

    The paper's values are those of the next-sentence experiment of Hu et al. 2024 unless said otherwise; why
    ours differ is told in docs/training.md.
    """

    objective: str = field(
        default="subtb", metadata={"help": "subtb, db, tb, vargrad or forward_kl. Paper: subtb."}
    )
    num_samples: int = field(
        default=8, metadata={"help": "Completions per prompt (K). Paper: 8; infilling 16."}
    )
    subtb_lambda: float = field(
        default=1.0, metadata={"help": "Weight decay with length in SubTB. Paper: 1.0."}
    )
    subtb_states: int | None = field(
        default=None,
        metadata={"help": "Train SubTB on so many random stopping states per completion. Paper: all (None)."},
    )
    log_z: str = field(
        default="group",
        metadata={
            "help": "log Z of a prompt, which tb needs, and db and subtb where min_tokens > 0: estimated from the "
            "'group' of its samples, or 'learned'. Paper: subtb without it."
        },
    )
    log_z_learning_rate: float = field(default=0.1, metadata={"help": "Step size of learned log Z."})
    replay_ratio: float = field(
        default=0.25,
        metadata={"help": "Share of prompts whose completions come from the buffer. Paper: 0.25."},
    )
    corrected_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of prompts with completions drawn near the posterior: by importance resampling, from the "
            "policy and the buffer. replay_ratio is then the share of the others. Paper: no such."
        },
    )
    corrected_method: str = field(
        default="sir",
        metadata={
            "help": "How these come from the policy: 'sir', or 'smc' by prefix rewards. Paper: no such."
        },
    )
    corrected_particles: int = field(
        default=32,
        metadata={"help": "Completions drawn and scored to correct one prompt once. Paper: no such."},
    )
    buffer_size: int = field(default=50, metadata={"help": "Completions kept per prompt. Paper: 50."})
    buffer_prioritized: bool = field(
        default=True, metadata={"help": "Draw from the buffer in proportion to reward. Paper: yes."}
    )
    tempered_ratio: float = field(
        default=0.5,
        metadata={"help": "Share of the other prompts sampled at a random temperature. Paper: 0.67."},
    )
    temperature_range: tuple[float, float] = field(
        default=(0.5, 2.0), metadata={"help": "Range of that temperature, uniform. Paper: 0.5 to 2."}
    )
    epsilon: float = field(default=0.0, metadata={"help": "Share of uniformly random tokens. Paper: 0."})
    reward_temperature: tuple[float, float, int] = field(
        default=(1.0, 1.0, 1),
        metadata={
            "help": "(start, end, steps): log R is divided by a temperature that moves linearly. Paper: 1.0 to 0.8 "
            "in 750 steps; infilling 1.1 to 0.85 in 100. Ours: the target states its own temperature."
        },
    )
    hard_penalty: float = field(
        default=15.0,
        metadata={"help": "What violating a hard constraint costs in training, in nats. Paper: no such."},
    )
    diagnose_steps: int = field(
        default=25,
        metadata={"help": "Diagnose on a few prompts (ESS, ELBO, samples) every so many steps; 0: never."},
    )
    stop_at_gap: float = field(
        default=0.0,
        metadata={
            "help": "Stop, and save a certificate, once the smaller of KL(q||p) and KL(p||q) is at most so many nats "
            "on the prompts that are diagnosed; 0: never. Paper: no such."
        },
    )

    # Defaults of TrainingArguments that differ here. See docs/training.md.
    output_dir: str | None = field(default="runs/amortlm")
    learning_rate: float = 3e-4
    max_steps: int = 200
    warmup_steps: float = 10
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 5
    save_steps: float = 100
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    disable_tqdm: bool | None = None
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self.temperature_range = tuple(self.temperature_range)  # type: ignore[assignment]
        self.reward_temperature = tuple(self.reward_temperature)  # type: ignore[assignment]
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) is False:
                setattr(self, name, "no")  # as YAML reads a bare `no`
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of the data depends on the global random state
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}; {nearest(self.objective, OBJECTIVES)}")
        if self.log_z not in ("learned", "group"):
            raise ConfigError(f"log_z is 'learned' or 'group', not {self.log_z!r}")
        if self.num_samples < (2 if self.objective in GROUP_OBJECTIVES or self.log_z == "group" else 1):
            raise ConfigError(
                f"objective {self.objective!r} with log_z={self.log_z!r} compares samples of one prompt: num_samples "
                "must be at least 2 (or set log_z='learned' for tb, db and subtb)"
            )
        if self.subtb_states is not None and self.subtb_states < 2:
            raise ConfigError("subtb_states must be at least 2: a pair residual needs two states")
        for name in ("replay_ratio", "tempered_ratio", "epsilon", "corrected_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        self._check_behaviour()
        if self.stop_at_gap < 0 or (self.stop_at_gap > 0 and self.diagnose_steps < 1):
            raise ConfigError(
                f"stop_at_gap={self.stop_at_gap}: give nats above 0 (0: never), with diagnose_steps of at least 1"
            )
        low, high = self.temperature_range
        start, end, steps = self.reward_temperature
        if not 0 < low <= high or start <= 0 or end <= 0 or steps < 1:
            raise ConfigError(
                "temperatures must be positive, ranges ordered, and the schedule at least one step"
            )

    def _check_behaviour(self) -> None:
        off = [n for n in ("replay_ratio", "tempered_ratio", "epsilon") if getattr(self, n) > 0]
        if self.objective == "forward_kl" and off:
            raise ConfigError(
                f"forward_kl weighs samples by R / q, which is right for samples of q alone: set {' and '.join(off)} "
                "to 0 (corrected_ratio brings in the buffer with the right weights)"
            )
        if self.corrected_method not in ("sir", "smc"):
            raise ConfigError(f"corrected_method is 'sir' or 'smc', not {self.corrected_method!r}")
        if self.corrected_particles < 1 or (self.corrected_ratio > 0 and self.num_samples < 2):
            raise ConfigError("corrected samples need corrected_particles >= 1 and num_samples >= 2")

    def reward_temperature_at(self, step: int) -> float:
        """Temperature of log R at an update: linear from start to end, then constant."""
        start, end, steps = self.reward_temperature
        return start + (end - start) * min(1.0, step / steps)
