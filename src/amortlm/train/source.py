"""Where training trajectories come from: the policy, the tempered policy, the replay buffer, and corrected samples."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from amortlm.buffer import ReplayBuffer
from amortlm.engine.decoding import Exploration
from amortlm.errors import ConfigError
from amortlm.inference.smc import smc
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.train.config import GFNConfig
from amortlm.types import Rollouts, Row, row_key
from amortlm.weights import systematic

Step = tuple[int, int]  # update, micro-batch


class TrajectorySource:
    """Draws K completions per prompt from a mix of behaviours, chosen prompt by prompt.

    All randomness is a function of (seed, step, row): it is the same after a resume and on any number of
    processes.

    **Corrected prompts.** Draws z_k of the policy with weights w_k are an unbiased estimate of the measure R; on the
    completions S in the buffer R is known. So

        sum_{z in S} R(z) delta_z + 1/M sum_{k: z_k not in S} w_k delta_{z_k}

    is one too, with S free of noise: what was found once keeps its exact mass however rarely q writes it, at no
    pass of a model. Resampled, it gives draws of R / Z, biased by O(1/M). A mode that neither q nor the buffer has
    seen stays unseen.
    """

    def __init__(self, policy: Policy, target: Target, buffer: ReplayBuffer, config: GFNConfig):
        """target: the rewards that are trained on, finite everywhere (`Softened`)."""
        self.policy, self.target, self.buffer, self.config = policy, target, buffer, config
        if (
            config.corrected_ratio > 0
            and config.corrected_method == "smc"
            and policy.support.tool is not None
        ):
            raise ConfigError(
                "corrected_method='smc' cannot cut a completion that a tool writes into: use corrected_method='sir'"
            )

    def collect(self, rows: Sequence[Row], step: Step) -> Rollouts:
        """Trajectories for one micro-batch: B = N * num_samples, those of a row together."""
        choices = [random.Random(seed_of((self.config.seed, step, row_key(row)))) for row in rows]
        given = [
            self._correct(row, step) if corrected else self._replay(row, choice)
            for row, choice, corrected in zip(rows, choices, self.corrected(rows, step), strict=True)
        ]
        fresh = [self.config.num_samples - len(old) for old in given]
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
        if any(given):
            parts.append(self.policy.rollouts(rows, given))
        return Rollouts.cat(parts)

    def corrected(self, rows: Sequence[Row], step: Step) -> Tensor:
        """[N] bool: the prompts that get corrected samples at a step."""
        draws = [
            random.Random(seed_of(("corrected", self.config.seed, step, row_key(r)))).random() for r in rows
        ]
        return torch.tensor(draws) < self.config.corrected_ratio

    def _correct(self, row: Row, step: Step) -> list[list[int]]:
        """Completions drawn near R / Z: all K for `forward_kl`, which takes them for draws of the posterior, and half
        of them for the others, whose residuals compare them with what q writes now."""
        candidates, log_mass = self.estimate(row, step)
        k = self.config.num_samples if self.config.objective == "forward_kl" else self.config.num_samples // 2
        u = random.Random(seed_of(("resample", self.config.seed, step, row_key(row)))).random()
        return [candidates[i] for i in systematic(log_mass, k, torch.tensor(u)).tolist()]

    def estimate(self, row: Row, step: Step) -> tuple[list[list[int]], Tensor]:
        """(completions with their stop symbols, log masses): together an unbiased estimate of the measure R (class
        docstring), at the reward temperature of the step. What is drawn for it also goes into the buffer."""
        temperature = self.config.reward_temperature_at(step[0])
        known = list(self.buffer.entries(row_key(row)))
        seen = {e.tokens for e in known}
        completions = [[*e.tokens, e.stop] for e in known]
        log_mass = [e.log_reward / temperature for e in known]
        pool, log_weights, log_reward = self._pool(row, temperature, (self.config.seed, step, "corrected"))
        drawn = zip(pool.completions(), pool.stops.tolist(), log_weights.tolist(), strict=True)
        for tokens, stop, log_w in drawn:
            if tuple(tokens) not in seen:
                completions.append([*tokens, stop])
                log_mass.append(log_w - math.log(len(pool)))
        self.buffer.add(pool, log_reward)
        return completions, torch.tensor(log_mass, dtype=torch.float64)

    def _pool(self, row: Row, temperature: float, seed: object) -> tuple[Rollouts, Tensor, Tensor]:
        """(completions of the policy, their log weights for R^(1/temperature) / q [M], log R [M])."""
        m = self.config.corrected_particles
        if self.config.corrected_method == "smc":
            particles = smc(self.policy, self.target / temperature, row, num_particles=m, seed=seed)
            return particles.rollouts, particles.log_weights, particles.log_reward * temperature
        rollouts, log_probs = self.policy.sample([row], m, seed=seed)
        log_reward = self.target.score_final(rollouts)
        return rollouts, log_reward / temperature - log_probs.final(rollouts.lengths), log_reward

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
