"""Monte Carlo and training over lists against the exact posterior."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL
from structured_cases import ROW, SUPPORTS, TWO, p_value, two_latents

from amortlm import (
    GFNConfig,
    GFNTrainer,
    LanguageModel,
    Policy,
    Support,
    Unordered,
    constraint,
    default_lora,
    exact,
)
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.targets import Target


def calm(lm: LanguageModel) -> LanguageModel:
    """The model with smaller weights: a posterior that is spread out."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.data *= 0.5
    return LanguageModel(model, lm.tokenizer)


@pytest.mark.parametrize("name", ["exactly two", "any number"])
def test_monte_carlo_agrees_with_enumeration(one_lm: LanguageModel, name: str) -> None:
    lm = calm(one_lm)
    policy = tiny_policy(lm, "{x}", SUPPORTS[name])
    target = (
        two_latents(lm) if name == "exactly two" else Unordered(lm.log_prob("{z}{y}", given="{x}"), ",")
    ) / 3
    truth = exact.enumerate_posterior(target, policy.support, ROW)
    chains = metropolis_hastings(policy, target, ROW, num_chains=1500, num_steps=12, seed=1)
    assert p_value(policy, chains.rollouts, truth.log_p) > LEVEL
    start = metropolis_hastings(policy, target, ROW, num_chains=1500, num_steps=0, seed=1)
    assert p_value(policy, start.rollouts, truth.log_p) < LEVEL, "the policy alone is told apart"
    log_z = torch.tensor(
        [smc(policy, target, ROW, num_particles=256, seed=s).log_z for s in range(12)]
    ).double()
    error = (log_z.exp().mean() / math.exp(truth.log_z) - 1).abs().item()
    assert error < 6 * (log_z.exp().std() / math.exp(truth.log_z)).item() / math.sqrt(12)
    assert error < 0.1


def trained(lm: LanguageModel, target: Target, support: Support, folder: Path) -> GFNTrainer:
    trainer = GFNTrainer(
        lm,
        target=target,
        prompt="{x}",
        support=support,
        train_dataset=[ROW],
        adapter=default_lora(8),
        args=GFNConfig(
            output_dir=str(folder),
            objective="vargrad",
            max_steps=150,
            num_samples=48,
            per_device_train_batch_size=1,
            learning_rate=3e-3,
            epsilon=0.1,
            save_strategy="no",
            diagnose_steps=0,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_training_reaches_the_posterior_over_sets(one_lm: LanguageModel, tmp_path: Path) -> None:
    support = Support(stop=".", max_tokens=5, allowed_tokens=TWO, separator=",", min_statements=2)
    likes_a_first = constraint.matches("a.*", penalty=3.0)
    inner = one_lm.log_prob("{z}{y}", given="{x}") / 3 + likes_a_first
    target, bound = Unordered(inner, ","), support.bind(one_lm)
    truth = exact.enumerate_posterior(target, bound, ROW)
    ordered = exact.enumerate_posterior(inner, bound, ROW)
    trainer = trained(one_lm, target, support, tmp_path)
    q = exact.policy_log_probs(trainer.policy, ROW)
    untrained = exact.policy_log_probs(Policy(one_lm, "{x}", support), ROW)
    distances = [exact.distance(p, truth.log_p).total_variation for p in (q, untrained, ordered.log_p)]
    assert distances[0] < 0.1, distances
    # The control: neither the untrained sampler nor the posterior over ordered lists would pass.
    assert min(distances[1:]) > 0.2, distances
