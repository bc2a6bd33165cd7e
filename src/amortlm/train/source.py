"""The trajectories that the trainer learns from (`Experience`), and their sources."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from amortlm.buffer import ReplayBuffer
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import Request
from amortlm.errors import ConfigError
from amortlm.inference.smc import smc
from amortlm.objectives import Objective
from amortlm.policy.guide import guided_law
from amortlm.policy.policy import Policy
from amortlm.rollout import HTTPSampler
from amortlm.seeds import seed_of
from amortlm.support import SupportLaw
from amortlm.targets.base import Target
from amortlm.train.behaviour import CORRECTED, Choice, chances, choose
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
        rows: Sequence[Row],
        server: HTTPSampler | None = None,
    ):
        """target: the rewards used in training, finite everywhere (`Softened`). rows: those to train on. server: what
        draws in place of the policy's own sampler."""
        self.policy, self.target, self.buffer, self.rows = policy, target, buffer, rows
        self.objective, self.config = objective, config
        self.server = server
        self._asked = -1  # the last update whose draws the server was asked for
        # Corrected completions of a prompt. The loss compares half of them with fresh ones of q, unless it takes all as
        # draws of the posterior.
        self._resampled = config.num_samples if objective.posterior_only else config.num_samples // 2
        if (
            config.behaviour[CORRECTED] > 0
            and config.corrected_method == "smc"
            and policy.support.tool is not None
        ):
            raise ConfigError(
                "corrected_method='smc' cannot cut a completion that a tool writes into: use corrected_method='sir'"
            )

    def begin(self, update: int, upcoming: Callable[[int], Sequence[Sequence[Row]]]) -> None:
        """Before an update: the server gets the policy's weights, and is asked for the draws of this and the next
        `max_staleness` updates, so that it draws while the policy is trained. upcoming(update): its micro-batches of
        rows, none after the last update."""
        if self.server is None:
            return
        self.server.check()
        if update != self.server.version:
            self.server.send(self.policy.weights(), update)
        self.server.ahead.forget(update)
        if self.config.max_staleness == 0:
            self.server.check()
            return
        for later in range(max(update, self._asked + 1), update + self.config.max_staleness + 1):
            for micro, rows in enumerate(upcoming(later)):
                for request in self._requests(rows, (later, micro)):
                    self.server.ask(request, due=later)
            self._asked = later

    def _requests(self, rows: Sequence[Row], step: Step) -> list[Request]:
        """What `collect` will ask the server for, if the buffer then has as many completions as now."""
        choices = self.choices(rows, step)
        given = [
            self._resampled if choice.corrected else len(self._replay(row, choice))
            for row, choice in zip(rows, choices, strict=True)
        ]
        fresh = self._fresh(rows, choices, given, step)
        if self.config.corrected_method == "smc":
            return [fresh]
        pools = [row for row, choice in zip(rows, choices, strict=True) if choice.corrected]
        count, seed = self.config.corrected_particles, self._pool_seed(step)
        return [fresh, self.policy.request(pools, [count] * len(pools), [seed] * len(pools))]

    def collect(self, rows: Sequence[Row], step: Step) -> Experience:
        """The experience of one micro-batch: B = N * num_samples trajectories, those of a row next to each other. They
        are also added to the buffer."""
        choices = self.choices(rows, step)
        rollouts, log_q, version = self.draw(rows, step, choices)
        rollouts = self.thin(rollouts, step)
        distinct, place = rollouts.distinct()  # samples of a policy with low entropy repeat
        log_reward = self.target.score(distinct)[place]
        self.buffer.add(rollouts, log_reward.gather(1, rollouts.lengths[:, None]).squeeze(1))
        from_posterior = torch.tensor([choice.corrected for choice in choices], device=log_q.device)
        return Experience(rollouts, log_reward, log_q, version, from_posterior)

    def draw(
        self, rows: Sequence[Row], step: Step, choices: Sequence[Choice]
    ) -> tuple[Rollouts, Tensor, int]:
        """(trajectories, the sampler's log q [B], nats, the version of its weights)."""
        given = [
            self._correct(row, step) if choice.corrected else self._replay(row, choice)
            for row, choice in zip(rows, choices, strict=True)
        ]
        parts, log_q, version = [], [], step[0]
        fresh = self._fresh(rows, choices, [len(old) for old in given], step)
        if any(fresh.counts):
            draws = (self.server or self.policy.sampler).sample(fresh)
            rollouts, log_probs = self.policy.drawn(rows, fresh, draws)
            parts.append(rollouts)
            log_q.append(log_probs.final(rollouts.lengths))
            version = version if self.server is None else draws.version
        prior = [
            self.config.num_samples - len(old) if choice.temperature is None else 0
            for old, choice in zip(given, choices, strict=True)
        ]
        if any(prior):
            parts.append(self._from_prior(rows, prior, step))
        if any(given):
            parts.append(self.policy.rollouts(rows, given))
        log_q += [
            torch.full((len(part),), torch.nan, device=self.policy.device) for part in parts[len(log_q) :]
        ]
        order = torch.cat([part.row_index for part in parts]).argsort(stable=True)
        return Rollouts.cat(parts), torch.cat(log_q)[order], version  # in the order of `cat`

    def _from_prior(self, rows: Sequence[Row], counts: Sequence[int], step: Step) -> Rollouts:
        """Completions of the model before training; where the support has an automaton, of the guided model at a random
        temperature: so what the automaton asks for is found, also where neither policy nor model would write it."""
        prior = self.policy.prior
        request = prior.request(rows, counts, [(self.config.seed, step)] * len(rows))
        if self._guided.is_guided:
            most = max(1.0, self.config.temperature_range[1])
            heat = random.Random(seed_of(("prior", self.config.seed, step))).uniform(1.0, most)
            hot = Exploration(torch.full((sum(counts),), heat, device=self.policy.device))
            request = replace(request, law=self._guided.sharpened(heat), exploration=hot)
        return prior.drawn(rows, request, prior.sampler.sample(request))[0]

    @cached_property
    def _guided(self) -> SupportLaw:
        return guided_law(self.policy, self.rows, self.config.seed)

    def choices(self, rows: Sequence[Row], step: Step) -> list[Choice]:
        """The behaviour of each prompt."""
        mix, temperatures = self.config.behaviour, self.config.temperature_range
        found = []
        for row in rows:
            at = (self.config.seed, step, row_key(row))
            corrected = random.Random(seed_of(("corrected", *at))).random() < chances(mix)[0]
            found.append(choose(mix, temperatures, corrected, random.Random(seed_of(at))))
        return found

    def _fresh(
        self, rows: Sequence[Row], choices: Sequence[Choice], given: Sequence[int], step: Step
    ) -> Request:
        """The policy's own completions: as many as are missing to num_samples, beside those given."""
        heat = [choice.temperature for choice in choices]
        counts = [0 if t is None else self.config.num_samples - n for t, n in zip(heat, given, strict=True)]
        each = torch.tensor([t for t, n in zip(heat, counts, strict=True) for _ in range(n)])
        exploration = Exploration(each.to(self.policy.device), self.config.epsilon)
        return self.policy.request(rows, counts, [(self.config.seed, step)] * len(rows), exploration)

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

    def _correct(self, row: Row, step: Step) -> list[list[int]]:
        """Corrected completions of a prompt, with their stop symbols."""
        candidates, log_mass = self.estimate(row, step)
        u = random.Random(seed_of(("resample", self.config.seed, step, row_key(row)))).random()
        return [candidates[i] for i in systematic(log_mass, self._resampled, torch.tensor(u)).tolist()]

    def estimate(self, row: Row, step: Step) -> tuple[list[list[int]], Tensor]:
        """(completions with their stop symbols, their log masses in nats): an unbiased estimate of the measure R (class
        docstring) at the reward temperature of the step. The completions drawn are also added to the buffer."""
        temperature = self.config.reward_temperature_at(step[0])
        known = list(self.buffer.entries(row_key(row)))
        seen = {e.tokens for e in known}
        completions = [[*e.tokens, e.stop] for e in known]
        log_mass = [e.log_reward / temperature for e in known]
        pool, log_weights, log_reward = self._pool(row, temperature, self._pool_seed(step))
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

    def _pool_seed(self, step: Step) -> object:
        return (self.config.seed, step, "corrected")

    def _replay(self, row: Row, choice: Choice) -> list[list[int]]:
        if choice.replay is None:
            return []
        generator = torch.Generator().manual_seed(choice.replay)
        drawn = self.buffer.draw(row_key(row), self.config.num_samples, generator)
        return [[*e.tokens, e.stop] for e in drawn]
