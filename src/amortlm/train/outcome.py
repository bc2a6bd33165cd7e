"""The warning of `GFNTrainer` at the end of training that failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from amortlm.diagnostics.importance import ImportanceEstimate

ERRORS = 3.0  # an ELBO is worse if it fell by more than so many standard errors
REMEDY = (
    "lower learning_rate, raise num_samples or max_steps, or start with a target that is closer to the prompt"
)


def complaint(start: dict[str, Any] | None, end: Sequence[ImportanceEstimate]) -> str | None:
    """A sentence about a sampler that is no good after training; None if no fault is known.

    start: the means over the same rows that were logged before the first step (ess, fresh_log_w_variance, elbo), or
    None. end: estimates of each row now.
    """
    samples = sum(e.n for e in end)
    if not any(e.valid for e in end):
        return (
            f"training found nothing: the target rejects all of {samples} completions drawn for {len(end)} prompts "
            "(R = 0: a violated constraint, or a verifier's -inf); state the constraint in the prompt, give accepted "
            "completions (gold), or put the constraint into the support (pattern=)"
        )
    if start is None:
        return None
    ess = _mean([e.ess for e in end])
    elbo = _mean([e.elbo for e in end])
    variance = _mean([e.log_w_variance for e in end]) + start["fresh_log_w_variance"]
    if math.isfinite(elbo) and math.isfinite(start["elbo"]):
        worse = elbo < start["elbo"] - ERRORS * math.sqrt(variance / samples)
    else:  # the ELBO is -inf because of a completion with R = 0
        worse = ess < start["ess"] / 2
    if not worse:
        return None
    return (
        f"the sampler is worse than before training: ELBO {start['elbo']:.2f} -> {elbo:.2f} nats, ESS "
        f"{start['ess']:.2f} -> {ess:.2f} ({samples} samples for {len(end)} prompts); {REMEDY}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
