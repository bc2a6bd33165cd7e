"""log Z of each training row, learned together with the policy if the objective needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.types import Row, row_key
from amortlm.weights import log_mean_exp

CHUNK = 32  # rows at a time


class LearnedLogZ:
    """log Z [number of rows], nats, as a parameter of the policy, so that processes share its gradient."""

    def __init__(self, policy: Policy, rows: Sequence[Row], rate: float):
        self.policy, self.rows, self.rate = policy, rows, rate
        self._number = {row_key(row): i for i, row in enumerate(rows)}
        policy.log_z = nn.Parameter(torch.full((len(rows),), torch.nan))

    @property
    def values(self) -> Tensor:
        return self.policy.log_z.data

    def of(self, rows: Sequence[Row]) -> Tensor:
        """[N] log Z of these rows, with gradient."""
        return self.policy.log_z[[self._number[row_key(row)] for row in rows]]

    @torch.no_grad()
    def start(self, target: Target, num_samples: int, temperature: float, seed: object) -> None:
        """Initialise log Z with its importance estimate from samples: zero can be hundreds of nats off, and the mean of
        their log weights is lower by KL(q || p)."""
        for start in range(0, len(self.rows), CHUNK):
            rows = self.rows[start : start + CHUNK]
            rollouts, log_probs = self.policy.sample(rows, num_samples, seed=seed)
            log_w = target.score_final(rollouts) / temperature - log_probs.final(rollouts.lengths)
            self.values[start : start + CHUNK] = log_mean_exp(log_w.view(len(rows), -1))

    def give_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Move log Z to a parameter group of its own in the optimizer, with its own learning rate."""
        log_z = self.policy.log_z
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not log_z]
        optimizer.add_param_group({"params": [log_z], "lr": self.rate, "weight_decay": 0.0})
