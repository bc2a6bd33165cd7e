"""Samples of many rows for the infilling experiment, from a trained posterior or from a slow sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.posterior import Posterior
from amortlm.types import Rollouts, Row
from amortlm.weights import effective_sample_size


@dataclass(frozen=True)
class Drawn:
    """Samples of some rows: texts [N][n], log_reward [N, n], ess [N] as a share (nan where it has no meaning)."""

    texts: list[list[str]]
    log_reward: Tensor
    ess: list[float]


class Slow:
    """MCMC or SMC as a sampler: one run for each row, from the prompted model."""

    def __init__(
        self,
        base: Posterior,
        run: Callable[[Posterior, Row, int, object], tuple[Rollouts, float]],
        stories: int,
    ):
        self.base, self.run, self.stories = base, run, stories

    def draw(self, rows: Sequence[Row], n: int, seed: object) -> Drawn:
        texts, rewards, ess = [], [], []
        for row in rows:
            rollouts, share = self.run(self.base, row, n, seed)
            texts.append(self.base.texts(rollouts))
            assert self.base.target is not None
            rewards.append(self.base.target.score_final(rollouts))
            ess.append(share)
        return Drawn(texts, torch.stack(rewards), ess)


def draw(posterior: Posterior, rows: Sequence[Row], n: int, seed: object, batch: int = 16) -> Drawn:
    """n samples of every row, and the share of them that importance weights leave effective."""
    assert posterior.target is not None
    texts, rewards, ess = [], [], []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        rollouts, log_q = posterior.policy.sample(part, n, seed=(seed, start))
        log_r = posterior.target.score_final(rollouts).view(len(part), n)
        log_w = log_r.double() - log_q.final(rollouts.lengths).double().view(len(part), n)
        flat = posterior.texts(rollouts)
        texts += [flat[i * n : (i + 1) * n] for i in range(len(part))]
        rewards.append(log_r)
        ess += [effective_sample_size(w) / n for w in log_w]
    return Drawn(texts, torch.cat(rewards), ess)
