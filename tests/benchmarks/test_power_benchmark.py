"""The law of block-wise Metropolis-Hastings in the benchmark is that of the library's sampler."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from benchmarks.posteriors.cases import policy_law, truth_of
from benchmarks.posteriors.laws import Law
from benchmarks.power.blocks_law import blockwise
from stats import LEVEL, g_test

from amortlm import LanguageModel, Policy, Support, tempered
from amortlm.inference.blocks import blockwise_metropolis_hastings

ROW: dict[str, str] = {}


@pytest.mark.parametrize(("low", "block"), [(0, 1), (1, 2), (2, 1)])
def test_the_law_of_a_few_steps_is_what_the_sampler_does(one_lm: LanguageModel, low: int, block: int) -> None:
    """Also far from convergence. Controls: one step fewer, another block, and the posterior."""
    support = Support(stop=".", min_tokens=low, max_tokens=4, allowed_tokens=(" a", " cat", "s"))
    policy = tempered(Policy(one_lm, "the dog", support), 1.5)
    target = 0.5 * one_lm.log_prob("{z}", given="the cat")
    truth, log_q = truth_of(target, policy), policy_law(policy)
    found = blockwise_metropolis_hastings(
        policy, target, ROW, num_chains=4000, block_tokens=block, num_steps=2, seed=0
    )
    counts = Counter(map(tuple, found.rollouts.completions()))
    observed = torch.tensor([counts[tuple(z)] for z in truth.completions])
    assert observed.sum() == 4000

    def fits(mass: np.ndarray) -> bool:
        return g_test(observed, torch.from_numpy(mass)) > LEVEL

    def law(block: int, steps: int) -> Law:
        return blockwise(truth.space, log_q, truth.log_r, block, steps)

    assert fits(law(block, 2).mass)
    assert not fits(law(block, 1).mass)
    assert not fits(truth.p)


def test_the_law_converges_to_the_posterior(one_lm: LanguageModel) -> None:
    support = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=(" a", " cat", "s"))
    policy = tempered(Policy(one_lm, "the dog", support), 1.5)
    truth = truth_of(0.5 * one_lm.log_prob("{z}", given="the cat"), policy)
    log_q = policy_law(policy)
    distances = [
        blockwise(truth.space, log_q, truth.log_r, 1, steps).total_variation(truth.p)
        for steps in (0, 10, 3000)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3
