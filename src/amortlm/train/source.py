"""The trajectories that the trainer learns from (`Experience`), and their sources."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amortlm.buffer import ReplayBuffer
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import LocalSampler
from amortlm.errors import ConfigError
from amortlm.inference.smc import smc
from amortlm.objectives import Objective
from amortlm.policy.policy import Policy
from amortlm.rollout import HTTPSampler
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.train.behaviour import chances
from amortlm.train.config import GFNConfig
from amortlm.types import PolicyLogProbs, Rollouts, Row, row_key
from amortlm.weights import systematic

Step = tuple[int, int]  # update, micro-batch
FAR = 0.1  # nats per token


@dataclass(frozen=True)
class Experience:
    """B trajectories of N prompts, with the data that the loss needs besides the policy.

    rollouts        with the stopping states that the objective uses
    log_reward      [B, T+1]  log R at these states, nats, before the reward temperature
    log_q           [B]       the sampler's log q of the whole trajectory, nats; NaN if it was not drawn in this step
    version         version of the weights that drew: the number of the update that began with them
    from_posterior  [N] bool  prompts whose completions include corrected samples
    """

    rollouts: Rollouts
    log_reward: Tensor
    log_q: Tensor
    version: int
    from_posterior: Tensor

    def mismatch(self, log_probs: PolicyLogProbs) -> dict[str, float]:
        """The mean and maximum difference between the sampler's and the trainer's log q of the completions drawn in
        this step, in nats per token (the stop counts as one), and the share of differences above FAR; {} if none was
        drawn. If it is far from 0, sampler and trainer have different distributions. log_probs: the trainer's."""
        lengths = self.rollouts.lengths
        off = (log_probs.final(lengths) - self.log_q).abs() / (lengths + 1)
        drawn = off[~self.log_q.isnan()]
        if len(drawn) == 0:
            return {}
        return {
            "sampler_mismatch": drawn.mean().item(),
            "sampler_mismatch_share": (drawn > FAR).float().mean().item(),
            "sampler_mismatch_max": drawn.max().item(),
        }


class ExperienceSource:
    """Draws K completions per prompt from a mix of behaviours, chosen prompt by prompt, and scores them.

    All randomness is a function of (seed, step, row): it is the same after a resume and on any number of
    processes.

    **Corrected prompts.** Draws z_k of the policy with weights w_k are an unbiased estimate of the measure R. For the
    completions S in the buffer, R is known. So

        sum_{z in S} R(z) delta_z + 1/M sum_{k: z_k not in S} w_k delta_{z_k}

    is also an unbiased estimate, without noise on S: a completion in the buffer has its exact mass, even if q rarely
    writes it, and costs no pass of a model. Resampled, this gives draws of R / Z with a bias of O(1/M). A mode that
    neither q nor the buffer has seen stays unseen.
    """

    def __init__(
        self,
        policy: Policy,
        target: Target,
        buffer: ReplayBuffer,
        objective: Objective,
        config: GFNConfig,
        server: HTTPSampler | None = None,
    ):
        """target: the rewards used in training, finite everywhere (`Softened`). server: what draws in place of the
        policy's own sampler."""
        self.policy, self.target, self.buffer = policy, target, buffer
        self.objective, self.config = objective, config
        found = chances(config.behaviour)
        self._corrected_chance, self._replay_chance, self._tempered_chance, self._prior_chance = found
        self.server = server
        self._prior = LocalSampler(policy.lm.model, policy.lm.sharing, policy.lm.memory)
        if (
            self._corrected_chance > 0
            and config.corrected_method == "smc"
            and policy.support.tool is not None
        ):
            raise ConfigError(
                "corrected_method='smc' cannot cut a completion that a tool writes into: use corrected_method='sir'"
            )

    def collect(self, rows: Sequence[Row], step: Step) -> Experience:
        """The experience of one micro-batch: B = N * num_samples trajectories, those of a row next to each other. They
        are also added to the buffer."""
        self._renew(step[0])
        from_posterior = self.corrected(rows, step)
        rollouts, log_q = self.draw(rows, step, from_posterior)
        rollouts = self.thin(rollouts, step)
        distinct, place = rollouts.distinct()  # samples of a policy with low entropy repeat
        log_reward = self.target.score(distinct)[place]
        self.buffer.add(rollouts, log_reward.gather(1, rollouts.lengths[:, None]).squeeze(1))
        version = step[0] if self.server is None else self.server.version
        return Experience(rollouts, log_reward, log_q, version, from_posterior.to(log_q.device))

    def _renew(self, update: int) -> None:
        """Give the server the policy's weights if those that it has lag behind by more than max_staleness updates."""
        if self.server is not None and update - self.server.version > self.config.max_staleness:
            self.server.load(self.policy.weights(), update)

    def draw(self, rows: Sequence[Row], step: Step, corrected: Tensor) -> tuple[Rollouts, Tensor]:
        """(trajectories, the sampler's log q [B], nats). corrected [N] bool: prompts that get corrected samples."""
        choices = [random.Random(seed_of((self.config.seed, step, row_key(row)))) for row in rows]
        given = [
            self._correct(row, step) if yes else self._replay(row, choice)
            for row, choice, yes in zip(rows, choices, corrected.tolist(), strict=True)
        ]
        heat = [self._temperature(choice) for choice in choices]
        fresh = [self.config.num_samples - len(old) for old in given]
        own = [0 if t is None else n for n, t in zip(fresh, heat, strict=True)]
        prior = [n if t is None else 0 for n, t in zip(fresh, heat, strict=True)]
        seed, parts, log_q = (self.config.seed, step), [], []
        if any(own):
            each = [t for n, t in zip(own, heat, strict=True) for _ in range(n)]
            exploration = Exploration(torch.tensor(each, device=self.policy.device), self.config.epsilon)
            rollouts, log_probs = self.policy.sample(
                rows, own, seed=seed, exploration=exploration, sampler=self.server
            )
            parts.append(rollouts)
            log_q.append(log_probs.final(rollouts.lengths))
        if any(prior):
            parts.append(self.policy.sample(rows, prior, seed=seed, sampler=self._prior)[0])
        if any(given):
            parts.append(self.policy.rollouts(rows, given))
        log_q += [
            torch.full((len(part),), torch.nan, device=self.policy.device) for part in parts[len(log_q) :]
        ]
        order = torch.cat([part.row_index for part in parts]).argsort(stable=True)
        return Rollouts.cat(parts), torch.cat(log_q)[order]  # in the order of `cat`

    def thin(self, rollouts: Rollouts, step: Step) -> Rollouts:
        """Remove the stopping states that the objective does not use, so that they are not scored."""
        if not self.objective.every_prefix:
            return rollouts.final_only()
        generator = torch.Generator().manual_seed(seed_of((self.config.seed, "states", step)))
        return replace(rollouts, stop_mask=self.objective.kept_states(rollouts.stop_mask, generator))

    def add_gold(self, rows: Sequence[Row], gold: Sequence[Sequence[str | list[int]]]) -> None:
        """Score gold completions, a list per row, and put them into the buffer."""
        if any(gold):
            rollouts = self.policy.rollouts(rows, gold)
            self.buffer.add(rollouts, self.target.score_final(rollouts))

    def corrected(self, rows: Sequence[Row], step: Step) -> Tensor:
        """[N] bool: prompts that get corrected samples at a step."""
        draws = [
            random.Random(seed_of(("corrected", self.config.seed, step, row_key(r)))).random() for r in rows
        ]
        return torch.tensor(draws) < self._corrected_chance

    def _correct(self, row: Row, step: Step) -> list[list[int]]:
        """Corrected completions of a prompt, with their stop symbols: all K of them for an objective that treats them
        as draws of the posterior, else K / 2, which the objective compares with fresh samples of q."""
        candidates, log_mass = self.estimate(row, step)
        k = self.config.num_samples if self.objective.posterior_only else self.config.num_samples // 2
        u = random.Random(seed_of(("resample", self.config.seed, step, row_key(row)))).random()
        return [candidates[i] for i in systematic(log_mass, k, torch.tensor(u)).tolist()]

    def estimate(self, row: Row, step: Step) -> tuple[list[list[int]], Tensor]:
        """(completions with their stop symbols, their log masses in nats): an unbiased estimate of the measure R (class
        docstring) at the reward temperature of the step. The completions drawn are also added to the buffer."""
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
        """(completions of the policy, their log weights R^(1/temperature) / q [M], their log R [M]), nats."""
        m = self.config.corrected_particles
        if self.config.corrected_method == "smc":
            particles = smc(self.policy, self.target / temperature, row, num_particles=m, seed=seed)
            return particles.rollouts, particles.log_weights, particles.log_reward * temperature
        # The log q of a server is that of its weights, and so the right denominator, also where they lag behind.
        rollouts, log_probs = self.policy.sample([row], m, seed=seed, sampler=self.server)
        log_reward = self.target.score_final(rollouts)
        return rollouts, log_reward / temperature - log_probs.final(rollouts.lengths), log_reward

    def _replay(self, row: Row, choice: random.Random) -> list[list[int]]:
        if choice.random() >= self._replay_chance:
            return []
        generator = torch.Generator().manual_seed(choice.getrandbits(48))
        drawn = self.buffer.draw(row_key(row), self.config.num_samples, generator)
        return [[*e.tokens, e.stop] for e in drawn]

    def _temperature(self, choice: random.Random) -> float | None:
        """The temperature of the policy, or None for the prior."""
        u = choice.random()
        if u < self._tempered_chance:
            return choice.uniform(*self.config.temperature_range)
        return None if u < self._tempered_chance + self._prior_chance else 1.0
