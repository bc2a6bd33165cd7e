"""Looks at a run while it trains: a few prompts, a few fresh samples of each, always with the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.files import LOOKS
from amortlm.posterior import Posterior, Samples
from amortlm.train.config import GFNConfig
from amortlm.train.processes import Processes
from amortlm.types import Row, to_json

ROWS, DRAWS, EXAMPLES = 4, 64, 4  # a look: 4 prompts, 64 samples each, of which 4 are written as text


@dataclass(frozen=True)
class Look:
    """The samples of one prompt, and what they say."""

    samples: Samples
    estimate: ImportanceEstimate

    @classmethod
    def at(cls, posterior: Posterior, row: Row, n: int, seed: object) -> Look:
        samples = posterior.sample(row, n, seed=seed)
        log_reward = torch.tensor([s.log_reward for s in samples], dtype=torch.float64)
        log_q = torch.tensor([s.log_q for s in samples], dtype=torch.float64)
        return cls(samples, estimate(log_reward - log_q, log_reward))

    def to_dict(self) -> dict[str, object]:
        """Estimates, log weights in nats, the number of different texts, and a few of the samples."""
        log_weights = [s.log_reward - s.log_q for s in self.samples if s.log_reward is not None]
        distinct = len({s.text for s in self.samples})
        shown = [sample.to_dict() for sample in self.samples[:EXAMPLES]]
        return {**self.estimate.to_dict(), "distinct": distinct, "log_weights": log_weights, "samples": shown}


class Looks:
    """Looks at the first ROWS of the rows; each process takes its part of them. They are written to `looks.jsonl` in
    the output folder, which `amortlm report` reads."""

    def __init__(self, posterior: Posterior, rows: Sequence[Row], processes: Processes, args: GFNConfig):
        self.posterior, self.rows, self.processes = posterior, list(rows[:ROWS]), processes
        self.n = DRAWS if args.diagnose_steps else args.num_samples
        self.seed, self.folder = diagnosis_seed(args), Path(str(args.output_dir))
        self.written: int | None = None  # the last step

    def take(self) -> list[Look]:
        return self.processes.share(lambda row: Look.at(self.posterior, row, self.n, self.seed), self.rows)

    def write(self, step: int, looks: Sequence[Look]) -> None:
        self.written = step
        if self.processes.index != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOOKS).open("a", encoding="utf-8") as file:
            for row, look in zip(self.rows, looks, strict=True):
                file.write(to_json({"step": step, "row": row, **look.to_dict()}) + "\n")


def diagnosis_seed(args: GFNConfig) -> object:
    return ("diagnose", args.seed)


def mean(estimates: Sequence[ImportanceEstimate], name: str) -> float:
    return sum(getattr(e, name) for e in estimates) / len(estimates)
