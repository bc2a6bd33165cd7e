"""The exact posterior by enumeration of a small support."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amortlm.engine.prefix import pad_right
from amortlm.errors import SupportError
from amortlm.policy.policy import Policy
from amortlm.support import SupportLaw
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.types import Row

LIMIT = 200_000  # strings
CHUNK = 2048  # strings per pass


@dataclass(frozen=True)
class ExactPosterior:
    """Every completion of a support with its exact posterior probability.

    completions  the M token lists; log_p [M] normalised, nats; log_z: the exact log of the sum of R
    """

    completions: list[list[int]]
    log_p: Tensor
    log_z: float


@dataclass(frozen=True)
class Distance:
    """How far q is from the posterior p on an enumerated support. KL in nats.

    total_variation   in [0, 1]
    kl_qp             KL(q || p); inf if q gives probability to a completion with p = 0
    kl_pq             KL(p || q); inf if p gives probability to a completion with q = 0
    mass              total probability of q on the support: 1, up to rounding
    """

    total_variation: float
    kl_qp: float
    kl_pq: float
    mass: float


def enumerate_posterior(target: Target, support: SupportLaw, row: Row, limit: int = LIMIT) -> ExactPosterior:
    """Score every completion of the support. Raises SupportError if there are more than `limit`, if the target's
    latents do not fit the statements of the support, or if R = 0 for every completion."""
    check_statements(target, support)
    if (size := support.size()) > limit:
        count = str(size) if size < 10**6 else f"10^{math.log10(size):.1f}"  # too large for a float, maybe
        raise SupportError(
            f"the support has {count} completions, more than the limit of {limit} for enumeration; "
            "narrow it (allowed_tokens, max_tokens), raise `limit`, or use importance diagnostics"
        )
    completions, scores = [], []
    device = torch.device("cpu")
    for chunk in _chunks(support):
        tokens, lengths = pad_right(chunk, device)
        rollouts = support.rollouts([row], torch.zeros(len(chunk), dtype=torch.long), tokens, lengths)
        scores.append(target.score_final(rollouts).double().cpu())
        completions += chunk
    log_r = torch.cat(scores)
    log_z = log_r.logsumexp(0)
    if not torch.isfinite(log_z):
        raise SupportError(
            "the posterior is empty: R = 0 for every completion of the support; relax the constraints"
        )
    return ExactPosterior(completions, log_r - log_z, log_z.item())


@torch.no_grad()
def policy_log_probs(policy: Policy, row: Row) -> Tensor:
    """[M] log q of every completion of the policy's support, nats, in the order of `enumerate_posterior`."""
    out = []
    for chunk in _chunks(policy.support):
        rollouts = policy.rollouts([row], [chunk])
        out.append(policy.evaluate(rollouts).final(rollouts.lengths).double().cpu())
    return torch.cat(out)


def distance(log_q: Tensor, log_p: Tensor) -> Distance:
    """Exact distances between two distributions over the same M completions. log_q, log_p [M], nats."""
    q, p = log_q.double().exp(), log_p.double().exp()
    return Distance(
        total_variation=0.5 * (q - p).abs().sum().item(),
        kl_qp=_kl(log_q.double(), log_p.double()),
        kl_pq=_kl(log_p.double(), log_q.double()),
        mass=q.sum().item(),
    )


def _kl(log_a: Tensor, log_b: Tensor) -> float:
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum().item()


def _chunks(support: SupportLaw) -> Iterator[list[list[int]]]:
    """All completions, shorter ones first, in chunks of one length (no padding)."""
    for length in range(support.min_tokens, support.max_tokens + 1):
        strings = support.completions(length)
        while chunk := list(itertools.islice(strings, CHUNK)):
            yield chunk
