"""How a run ends: not worse than it once was, by the diagnosis of a few prompts, and whether it came to anything."""

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
    """How good the sampler was. score: nats; error: its standard error."""

    step: int
    score: float
    error: float

    @classmethod
    def of(cls, step: int, estimates: Sequence[ImportanceEstimate]) -> Standing:
        """The mean over prompts of the ELBO. Where completions are rejected (R = 0) it is that of those accepted, less
        what rejecting costs: -log of the accepted share. It is highest, log Z, where q is the posterior."""
        score = sum(e.accepted_elbo + math.log(e.valid) if e.valid else -math.inf for e in estimates)
        variance = sum(e.log_w_variance for e in estimates if e.log_w_variance == e.log_w_variance)
        draws = sum(e.n for e in estimates)
        return cls(step, score / len(estimates), math.sqrt(variance / len(estimates) / draws))

    def is_worse_than(self, other: Standing) -> bool:
        """By more than noise?"""
        return self.score < other.score - ERRORS * math.hypot(self.error, other.error)


class KeepBest:
    """Saves the adapter in `output_dir/best` whenever a diagnosis is better than all before, and brings it back where
    the last one is worse by more than noise."""

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
        """Bring back the best state if the last one is worse, and say so. All processes must call it."""
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
    """What is wrong with a sampler after training, in a sentence; None where nothing is known to be.

    end: estimates of a few prompts.
    """
    if any(e.valid for e in end):
        return None
    return (
        f"training found nothing: the target rejects all of {sum(e.n for e in end)} completions drawn for {len(end)} "
        "prompts (R = 0: a constraint that is not met, or a verifier's -inf); say it in the prompt, give completions "
        "that are accepted (gold), or tell the support (pattern=)"
    )
