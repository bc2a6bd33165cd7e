"""Where training trajectories come from: the policy, the tempered policy, and the replay buffer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from amortlm.buffer import ReplayBuffer
from amortlm.policy.policy import Policy
from amortlm.policy.sampling import Exploration, seed_of
from amortlm.train.config import GFNConfig
from amortlm.types import Rollouts, Row, row_key


class TrajectorySource:
    """Draws K completions per prompt from a mix of behaviours, chosen prompt by prompt.

    All randomness is a function of (seed, step, row): it is the same after a resume and on any number of
    processes.
    """

    def __init__(self, policy: Policy, buffer: ReplayBuffer, config: GFNConfig):
        self.policy, self.buffer, self.config = policy, buffer, config

    def collect(self, rows: Sequence[Row], step: object) -> Rollouts:
        """Trajectories for one micro-batch: B = N * num_samples, those of a row together."""
        choices = [random.Random(seed_of((self.config.seed, step, row_key(row)))) for row in rows]
        replayed = [self._replay(row, choice) for row, choice in zip(rows, choices, strict=True)]
        fresh = [self.config.num_samples - len(old) for old in replayed]
        parts = []
        if any(fresh):
            temperature = [
                t for choice, n in zip(choices, fresh, strict=True) for t in [self._temperature(choice)] * n
            ]
            exploration = Exploration(
                torch.tensor(temperature, device=self.policy.device), self.config.epsilon
            )
            parts.append(
                self.policy.sample(rows, fresh, seed=(self.config.seed, step), exploration=exploration)[0]
            )
        if any(replayed):
            parts.append(self.policy.rollouts(rows, replayed))
        return Rollouts.cat(parts)

    def _replay(self, row: Row, choice: random.Random) -> list[list[int]]:
        if choice.random() >= self.config.replay_ratio:
            return []
        generator = torch.Generator().manual_seed(choice.getrandbits(48))
        drawn = self.buffer.draw(row_key(row), self.config.num_samples, generator)
        return [[*e.tokens, e.stop] for e in drawn]

    def _temperature(self, choice: random.Random) -> float:
        if choice.random() >= self.config.tempered_ratio:
            return 1.0
        return choice.uniform(*self.config.temperature_range)
