"""Random integers (Hu et al. 2024, section 4.1): make "drawn uniformly between 0 and 100" true.

The posterior is uniform over the 101 integers, so how far the sampler is from it is known exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from amortlm.posterior import Posterior
from amortlm.train.spec import RunSpec

HIGHEST = 100
PAPER = "GPT-J 6B, Hu et al. 2024: valid 50.5 % -> 100 %, KL to uniform 3.37 -> 9.75e-5"


def is_valid(text: str) -> bool:
    """Is the text a space and one integer from 0 to 100, without leading zeros?"""
    return re.fullmatch(r" (0|[1-9][0-9]?|100)", text) is not None


SPEC = RunSpec(
    prompt="The following is a random integer drawn uniformly between 0 and 100:",
    target=[{"predicate": "numbers.is_valid"}, {"canonical": True}],
    support={"stop": ".", "min_tokens": 1, "max_tokens": 3},
    data=[{}],
    config={
        "objective": "vargrad",
        "max_steps": 250,
        "num_samples": 128,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "buffer_size": 128,
    },
)


@dataclass(frozen=True)
class Exactness:
    """Exact distance of q to the uniform distribution U on 0..100, by summing q over the 101 strings.

    probs[n] = q(n); valid = their sum; kl = KL(U || q) in nats, which counts mass on invalid text as lost;
    total_variation = TV(U, q)
    """

    probs: list[float]
    valid: float
    kl: float
    total_variation: float


def exactness(posterior: Posterior) -> Exactness:
    """`Exactness` of a posterior for the numbers task."""
    log_q = posterior.log_prob({}, [f" {n}" for n in range(HIGHEST + 1)]).double()
    q, uniform = log_q.exp(), 1.0 / (HIGHEST + 1)
    valid = q.sum().item()
    return Exactness(
        probs=q.tolist(),
        valid=valid,
        kl=(torch.tensor(uniform).double().log() - log_q).mean().item(),
        total_variation=0.5 * ((q - uniform).abs().sum().item() + 1 - valid),
    )
