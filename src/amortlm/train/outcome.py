"""The end of a run: its best state is kept, and a run that found nothing gives a warning."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from amortlm.diagnostics.importance import ImportanceEstimate
from amortlm.files import write_text
from amortlm.policy.policy import Policy
from amortlm.train.checkpoints import reading
from amortlm.train.processes import Processes

FOLDER, NOTE = "best", "best.json"
ERRORS = 3.0  # standard errors by which a score must differ
REMEDY = (
    "lower learning_rate, raise num_samples or max_steps, or start with a target that is closer to the prompt"
)


@dataclass(frozen=True)
class Standing:
    """The quality of the sampler at a step. score, and its standard error: nats."""

    step: int
    score: float
    error: float

    @classmethod
    def of(cls, step: int, estimates: Sequence[ImportanceEstimate]) -> Standing:
        """The mean over prompts of the ELBO, which is highest where q is the posterior. If completions are rejected
        (R = 0): the ELBO of q conditioned on R > 0, plus the log of the accepted share, the cost of rejection."""
        score = sum(e.accepted_elbo + math.log(e.valid) if e.valid else -math.inf for e in estimates)
        variance = sum(e.log_w_variance for e in estimates if e.log_w_variance == e.log_w_variance)
        draws = sum(e.n for e in estimates)
        return cls(step, score / len(estimates), math.sqrt(variance / len(estimates) / draws))

    def is_worse_than(self, other: Standing) -> bool:
        """By more than noise?"""
        return self.score < other.score - ERRORS * math.hypot(self.error, other.error)


class KeepBest:
    """Saves the adapter in `output_dir/best` when a diagnosis is better than all before, and loads it at the end if the
    last diagnosis is worse by more than noise."""

    def __init__(self, policy: Policy, output_dir: Path, processes: Processes):
        self.policy, self.folder, self.processes = policy, output_dir / FOLDER, processes

    def see(self, step: int, estimates: Sequence[ImportanceEstimate]) -> None:
        if self.processes.index != 0:
            return
        now, best = Standing.of(step, estimates), self.standing()
        if now.score > (-math.inf if best is None else best.score):
            self.policy.save_adapter(self.folder)
            write_text(self.folder / NOTE, json.dumps(asdict(now)))

    def standing(self) -> Standing | None:
        if not (self.folder / NOTE).exists():
            return None
        with reading(self.folder, NOTE):
            return Standing(**json.loads((self.folder / NOTE).read_text(encoding="utf-8")))

    def restore(self, end: Sequence[ImportanceEstimate], step: int) -> str | None:
        """Load the best state if the last one is worse, and return a sentence about it. All processes must call it."""
        self.processes.meet()
        best, last = self.standing(), Standing.of(step, end)
        if best is None or not last.is_worse_than(best):
            return None
        self.policy.load_adapter(self.folder)
        return (
            f"the sampler was better at step {best.step} (ELBO {best.score:.2f} nats) than at the end "
            f"({last.score:.2f}): the weights of that step are kept; {REMEDY}"
        )

    def forget(self) -> None:
        self.processes.meet()
        if self.processes.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def complaint(end: Sequence[ImportanceEstimate]) -> str | None:
    """A sentence about a sampler that is no good after training; None if no fault is known.

    end: estimates of a few prompts.
    """
    if any(e.valid for e in end):
        return None
    return (
        f"training found nothing: the target rejects all of {sum(e.n for e in end)} completions drawn for {len(end)} "
        "prompts (R = 0: a violated constraint, or a verifier's -inf); state the constraint in the prompt, give "
        "accepted completions (gold), or put the constraint into the support (pattern=)"
    )
