"""What a run shows while it trains: progress on a terminal, diagnostics and samples every few steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback

from amortlm.types import Row

if TYPE_CHECKING:
    from amortlm.train.trainer import GFNTrainer

SHOWN = {"loss": "loss", "log_w_variance": "var log w", "ess": "ESS"}
ROWS, SAMPLES, EXAMPLES = 4, 64, 4  # what one diagnosis costs: 4 prompts x 64 samples


class TrainingProgress(ProgressCallback):
    """The trainer's progress bar (rate, time left) with loss, log-weight variance and ESS beside it."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self._seen = {**getattr(self, "_seen", {}), **logs}
            shown = {label: f"{self._seen[k]:.3g}" for k, label in SHOWN.items() if k in self._seen}
            self.training_bar.set_postfix(shown)


class DiagnoseCallback(TrainerCallback):
    """Every `diagnose_steps` updates: ESS, log-weight variance and ELBO of fresh samples of a few prompts go to
    the log and its trackers, and the samples to `samples.jsonl` in the output folder."""

    def __init__(self, trainer: GFNTrainer, rows: Sequence[Row]):
        self.trainer, self.rows = trainer, list(rows[:ROWS])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._diagnose(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.diagnose_steps == 0:
            self._diagnose(state.global_step)

    def _diagnose(self, step: int) -> None:
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        seed = ("diagnose", trainer.args.seed)
        reports = [trainer.posterior.estimate(row, SAMPLES, seed=seed) for row in self.rows]
        names = ("ess", "log_w_variance", "elbo")
        means = {n: sum(getattr(r, n) for r in reports) / len(reports) for n in names}
        trainer.log(
            {"ess": means["ess"], "fresh_log_w_variance": means["log_w_variance"], "elbo": means["elbo"]}
        )
        folder = Path(str(trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a") as file:
            for row in self.rows:
                for sample in trainer.posterior.sample(row, EXAMPLES, seed=seed):
                    file.write(json.dumps({"step": step, "row": row, **sample.to_dict()}) + "\n")
