"""Targets made from a policy: R = q times a tilt, so how far q is from the posterior is known by construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import tiny_policy
from torch import Tensor

from amortlm import LanguageModel, Posterior, Support, Target
from amortlm.inference.exact import policy_log_probs
from amortlm.policy import Policy
from amortlm.targets.base import Scoring

ROW = {"x": "the dog"}
TOKENS = (" a", " cat", " dog", "s")
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=TOKENS)  # 84 completions


class Tilted(Target):
    """log R = log q + tilt(tokens); judges finished completions only."""

    every_prefix = False

    def __init__(self, policy: Policy, tilt: Callable[[list[int]], float]):
        self.policy, self.tilt = policy, tilt

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        log_r = self.policy.evaluate(rollouts).final(rollouts.lengths)
        log_r = log_r + torch.tensor([self.tilt(z) for z in rollouts.completions()])
        return log_r[:, None].expand(rollouts.stop_mask.shape)


def perfect(lm: LanguageModel) -> Posterior:
    """q is the posterior, and Z = e^2."""
    policy = tiny_policy(lm, "{x}", SUPPORT)
    return Posterior(policy, Tilted(policy, lambda z: 2.0))


def off(lm: LanguageModel, strength: float = 0.8) -> Posterior:
    """q is moderately off: the posterior wants other lengths and first tokens."""
    policy = tiny_policy(lm, "{x}", SUPPORT)
    first = policy.lm.token_id(TOKENS[0])
    return Posterior(policy, Tilted(policy, lambda z: strength * (len(z) - 2 + (z[0] == first))))


def blind(lm: LanguageModel) -> tuple[Posterior, list[int]]:
    """Half of the posterior is one completion that q writes once in 30,000, and that completion."""
    policy = tiny_policy(lm, "{x}", SUPPORT)
    log_q = policy_log_probs(policy, ROW)
    strings = [z for n in (1, 2, 3) for z in policy.support.completions(n)]
    rarest = int(log_q.argmin())
    assert log_q[rarest] < -10
    bonus = -log_q[rarest].item()
    return Posterior(policy, Tilted(policy, lambda z: bonus if z == strings[rarest] else 0.0)), strings[
        rarest
    ]
