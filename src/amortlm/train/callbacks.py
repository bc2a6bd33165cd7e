"""Callbacks of a run: a progress bar, diagnostics and samples every few steps, and the stop at `stop_at_gap`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from amortlm.buffer import ReplayBuffer
from amortlm.diagnostics import certificate
from amortlm.diagnostics.diagnose import LEVEL, Diagnosis, diagnose_row
from amortlm.diagnostics.importance import ImportanceEstimate
from amortlm.posterior import Posterior
from amortlm.train.config import GFNConfig
from amortlm.train.looks import DRAWS, Look, Looks, mean
from amortlm.train.outcome import KeepBest
from amortlm.train.processes import Processes
from amortlm.types import Row, row_key

SHOWN = {"loss": "loss", "log_w_variance": "var log w", "ess": "ESS", "gap": "gap", "eval_ess": "eval ESS"}
TERMINAL = {"ncols": 80, "nrows": 24}  # for a terminal of unknown size, on which tqdm would draw nothing
GOLD = 16  # gold completions of a prompt, from the buffer
Log = Callable[[dict[str, float]], None]


class TrainingProgress(ProgressCallback):
    """The trainer's progress bar (rate, time left) with loss, log-weight variance, ESS and gap beside it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and (self.training_bar.nrows or 1) < 1:
            self.training_bar.close()
            self.training_bar = tqdm(total=state.max_steps, **TERMINAL)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self._seen = {**getattr(self, "_seen", {}), **logs}
            shown = {label: f"{self._seen[k]:.3g}" for k, label in SHOWN.items() if k in self._seen}
            self.training_bar.set_postfix(shown)


class DiagnoseCallback(TrainerCallback):
    """Every `diagnose_steps` updates: ESS, log-weight variance and ELBO of fresh samples of a few prompts go to
    the log and its trackers, figures and samples to files in the output folder (`Looks`). With `stop_at_gap`, training
    ends when the gap of these prompts is small enough (`StopWhenRight`)."""

    def __init__(
        self,
        looks: Looks,
        log: Log,
        show: Callable[[int, list[Look]], None],
        best: KeepBest | None = None,
        stop: StopWhenRight | None = None,
    ):
        """show, best, stop: called after each look."""
        self.looks, self.log, self.show, self.best, self.stop = looks, log, show, best, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop is not None and state.is_world_process_zero:
            # A certificate of an earlier run in this folder is not about the adapter of this run.
            (Path(str(args.output_dir)) / certificate.FILE).unlink(missing_ok=True)
        if state.global_step == 0:
            self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.diagnose_steps != 0:
            return
        estimates = self._look(state.global_step)
        if self.stop is not None:
            control.should_training_stop |= self.stop.reached(state.global_step, self.looks.rows, estimates)

    def _look(self, step: int) -> list[ImportanceEstimate]:
        looks = self.looks.take()
        estimates = [look.estimate for look in looks]
        self.log(
            {
                "ess": mean(estimates, "ess"),
                "fresh_log_w_variance": mean(estimates, "log_w_variance"),
                "elbo": mean(estimates, "elbo"),
            }
        )
        self.looks.write(step, looks)
        self.show(step, looks)
        if self.best is not None:
            self.best.see(step, estimates)
        self.looks.processes.meet()  # the first gathers what it saves
        return estimates


class StopWhenRight:
    """Tests whether the gap (`amortlm.diagnostics.certificate`) of every diagnosed prompt is at most `stop_at_gap`. If
    so, it saves the posterior and its certificate in the output folder.

    The replay buffer's best completions are the gold completions: they may show a mode that the policy has lost.
    """

    def __init__(
        self,
        posterior: Posterior,
        data: Sequence[Row],
        buffer: ReplayBuffer,
        args: GFNConfig,
        processes: Processes,
        log: Log,
    ):
        """data: the training rows."""
        assert posterior.target is not None
        self.posterior, self.target = posterior, posterior.target
        self.data, self.buffer = data, buffer
        self.args, self.processes, self.log = args, processes, log

    def reached(self, step: int, rows: Sequence[Row], estimates: Sequence[ImportanceEstimate]) -> bool:
        """Measure the gap of the prompts at step `step`. estimates: cheap estimates of the same prompts; if one of
        them is above the mark, bounds are not computed."""
        args = self.args
        if any(_guess(e) > args.stop_at_gap for e in estimates):
            return False
        exact = self.posterior.policy.support.size() <= certificate.LIMIT
        n = DRAWS if exact else certificate.samples_for(args.stop_at_gap)
        gold = self._gold(rows)
        diagnosis = self._diagnose(step, rows, n, gold)
        found = certificate.worst(diagnosis)
        self.log({"gap": found})
        if not found <= args.stop_at_gap:
            return False
        if self.processes.index == 0:
            self.posterior.save_pretrained(str(args.output_dir))
            certificate.issue(
                self.posterior.policy,
                self.target,
                diagnosis,
                str(args.output_dir),
                mark=args.stop_at_gap,
                level=LEVEL,
                step=step,
                n=n,
                seed=args.seed,
                rows=rows,
                gold=gold,
                data=self.data,
            )
        self.processes.meet()
        return True

    def _diagnose(
        self, step: int, rows: Sequence[Row], n: int, gold: Sequence[Sequence[list[int]]]
    ) -> Diagnosis:
        level = certificate.look_level(step // self.args.diagnose_steps)
        found = self.processes.share(
            lambda i: diagnose_row(
                self.posterior.policy,
                self.target,
                rows[i],
                n,
                seed=("gap", self.args.seed, step),
                limit=certificate.LIMIT,
                level=level,
                gold=gold[i],
            ),
            range(len(rows)),
        )
        return Diagnosis(found)

    def _gold(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """For each prompt, the best completions in the buffers of all processes, each completion once."""
        own = [[(*e.tokens, e.stop) for e in self.buffer.entries(row_key(row))[-GOLD:]] for row in rows]
        everyone = zip(*self.processes.gather(own), strict=True)
        return [list(map(list, dict.fromkeys(chain(*parts)))) for parts in everyone]


def _guess(e: ImportanceEstimate) -> float:
    """An estimate of the gap from a few samples: KL(q || p) by the ELBO, which is too low, or the Renyi bound on
    KL(p || q)."""
    return math.inf if e.ess == 0 else min(e.log_z - e.elbo, -math.log(e.ess))
