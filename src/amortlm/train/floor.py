"""A check of the reward of rejected text: a low reward times very many strings can be most of Z."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from amortlm.support import SupportLaw
from amortlm.types import Rollouts

logger = logging.getLogger(__name__)
SHARE, LEAST = (
    0.5,
    4,
)  # of the distinct completions of a prompt, and how many, have the lowest reward if it is a floor


class FloorCheck:
    """Checks the first completions of a run, until some are better than the rest, and warns at most once.

    A floor is a lowest reward that many different completions share, such as that of a verifier for text that is no
    answer. The support may contain so many of these that a perfect sampler would hardly write anything else.
    """

    def __init__(self, law: SupportLaw):
        self.log_strings = math.log(max(1, law.size()))
        self.decided = False

    def see(self, rollouts: Rollouts, log_reward: Tensor) -> None:
        """rollouts: B trajectories; log_reward [B, T+1], nats."""
        if self.decided:
            return
        distinct, place = rollouts.distinct()
        final = log_reward.gather(1, rollouts.lengths[:, None]).squeeze(1)
        once = torch.zeros(len(distinct), device=final.device).index_copy(0, place, final)
        for i in range(len(rollouts.rows)):
            if not self.decided and (sentence := self._judge(once[distinct.row_index == i])) is not None:
                logger.warning("%s", sentence)

    def _judge(self, log_r: Tensor) -> str | None:
        """log_r [n]: of different completions of one prompt."""
        if len(log_r) < LEAST:
            return None
        floor = log_r.min()
        low = log_r <= floor + 1e-6
        if low.all():  # all are alike: uniform, or nothing accepted yet
            return None
        self.decided = True
        accepted = log_r[~low].logsumexp(0).item()
        rejected = self.log_strings + floor.item()
        if int(low.sum()) < max(LEAST, SHARE * len(log_r)) or rejected <= accepted:
            return None
        return (
            f"rejected completions outweigh accepted ones: the target gives {floor.item():.4g} nats to most of them, "
            f"and the support has up to 10^{self.log_strings / math.log(10):.1f}, so their rewards may sum to "
            f"exp({rejected:.1f}). Those of the better completions so far sum to exp({accepted:.1f}). The posterior "
            "would be mostly rejected text. State in the support what is accepted (pattern=, allowed_tokens=, "
            "max_tokens=), return -inf for the rest, or lower that reward by more than "
            f"{rejected - accepted:.0f} nats"
        )
