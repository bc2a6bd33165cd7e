"""Label probabilities for the subjectivity experiment: from p(y | x) itself, or averaged over a latent z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amortlm.lab.tasks.subjectivity import ANSWERS
from amortlm.policy import Policy
from amortlm.posterior import Posterior
from amortlm.types import Row

BATCH = 64


@dataclass(frozen=True)
class Direct:
    """p(y | x) without a latent: the label itself is what the policy writes."""

    policy: Policy

    def probabilities(self, rows: Sequence[Row], seed: object) -> list[list[float]]:
        """p of each answer, normalised among them, for each row; nothing is drawn."""
        out = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            rollouts = self.policy.rollouts(part, [[f" {a}" for a in ANSWERS]] * len(part))
            with torch.no_grad():
                log_q = self.policy.evaluate(rollouts).final(rollouts.lengths)
            out += log_q.view(len(part), len(ANSWERS)).double().softmax(1).tolist()
        return out


@dataclass(frozen=True)
class Latent:
    """p(y | x) as the mean of p(y | x z) over samples of z."""

    posterior: Posterior
    samples: int

    def probabilities(self, rows: Sequence[Row], seed: object) -> list[list[float]]:
        return [p.probs for p in self.posterior.predict(rows, ANSWERS, self.samples, seed=seed)]
