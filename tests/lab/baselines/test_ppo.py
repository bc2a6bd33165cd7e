"""PPO against slow loops, and its fixed point q ~ p_ref exp(r / beta) by enumeration."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import random_rollouts, tiny_policy
from torch import Tensor

from amortlm.engine import packs
from amortlm.engine.adapter import default_lora
from amortlm.errors import ConfigError, RewardError
from amortlm.inference.exact import distance, policy_log_probs
from amortlm.lab.baselines.finetune import BoundedReward, rows_of_step, working_copy
from amortlm.lab.baselines.ppo import (
    LOG,
    Experience,
    PPOConfig,
    ValueHead,
    actions,
    assess,
    evaluate_with_values,
    gae,
    slot_log_probs,
    surrogate,
    train_ppo,
)
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.types import Rollouts

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=["a", "b", "c", " cat", " ran"])
ROWS = [{"x": "the cat"}, {"x": "a dog ran"}]


def slow_gae(
    rewards: list[float], values: list[float], chosen: list[bool], gamma: float, lam: float
) -> list[float]:
    """sum_l (gamma lam)^l delta_{k+l}, over the actions of one trajectory."""
    slots = [t for t, c in enumerate(chosen) if c]
    out = [0.0] * len(chosen)
    for k, t in enumerate(slots):
        for i in range(k, len(slots)):
            following = values[slots[i + 1]] if i + 1 < len(slots) else 0.0
            delta = rewards[slots[i]] + gamma * following - values[slots[i]]
            out[t] += (gamma * lam) ** (i - k) * delta
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_equals_a_slow_loop(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, 6, generator=generator)
    action = torch.rand(7, 6, generator=generator) < 0.7  # with gaps, as tools leave them
    fast = gae(rewards * action, values, action, gamma, lam)
    slow = [slow_gae(*(x[b].tolist() for x in (rewards, values, action)), gamma, lam) for b in range(7)]
    torch.testing.assert_close(fast, torch.tensor(slow))


def test_actions_are_tokens_and_the_stop_that_is_a_choice(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    rollouts = policy.rollouts([ROWS[0]], [["a.", "abc.", "ab."]])
    assert actions(rollouts, 3).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, False],
    ]
    forced = rollouts.action_mask.clone()
    forced[2, 1] = False  # written by a tool
    assert actions(replace(rollouts, action_mask=forced), 3)[2].tolist() == [True, False, True, False]


def test_slots_sum_to_log_q(family_lm: LanguageModel) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT)
    rollouts = random_rollouts(family_lm, SUPPORT, ROWS, per_row=6)
    log_probs = policy.evaluate(rollouts)
    slots = slot_log_probs(log_probs, rollouts, actions(rollouts, 3))
    torch.testing.assert_close(slots.sum(1), log_probs.final(rollouts.lengths))


def test_values_read_the_last_hidden_state_of_every_state(
    family_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "MIN_SAVED", 0)  # groups of equal length, however small
    policy = tiny_policy(family_lm, "{x}", SUPPORT)
    torch.manual_seed(0)
    head = ValueHead(32)
    torch.nn.init.normal_(head.out.weight)
    rollouts = random_rollouts(family_lm, SUPPORT, ROWS)
    assert len(packs.length_groups(rollouts.lengths)) > 1
    log_probs, values = evaluate_with_values(policy, head, rollouts)
    torch.testing.assert_close(log_probs.log_pf, policy.evaluate(rollouts).log_pf)
    prompts = policy.encode_rows(rollouts.rows)
    for b, tokens in enumerate(rollouts.completions()):
        ids = torch.tensor([[*prompts[rollouts.row_index[b]], *tokens]])
        hidden = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        # At max_tokens the stop is sure: no choice, no value.
        expected = head(hidden[:, -len(tokens) - 1 :])[0, : policy.support.max_tokens]
        torch.testing.assert_close(values[b, : len(expected)], expected, atol=1e-5, rtol=1e-4)
        assert not values[b, policy.support.max_tokens :].any()
    values.sum().backward()
    assert all(p.grad is None for p in policy.parameters())  # fitting values does not move the policy


def reward_of(rollouts: Rollouts) -> Tensor:
    """Four distinct rewards that p knows nothing of."""
    first = rollouts.tokens[:, 0] % 2
    return first.float() + 0.5 * (rollouts.lengths == 2)


def test_surrogate_at_ratio_one_has_the_policy_gradient(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    weights = [p for p in policy.parameters() if p.requires_grad]
    rollouts, log_probs = policy.sample(ROWS, 5)
    config = PPOConfig(beta=0.3, lam=1.0, whiten=False)
    batch, _ = assess(
        policy, working_copy(policy), ValueHead(32), rollouts, log_probs, reward_of(rollouts), config
    )
    log_q = slot_log_probs(policy.evaluate(rollouts), rollouts, batch.action)
    loss, clipped = surrogate(log_q, batch, 0.2)
    assert clipped == 0
    fast = torch.autograd.grad(loss, weights)

    # REINFORCE, trajectory by trajectory: with lambda = 1, values 0 and q = p_ref the advantage is the reward.
    slow = [torch.zeros_like(p) for p in weights]
    for b in range(len(rollouts)):
        one = rollouts.select(torch.tensor([b]))
        log_prob = policy.evaluate(one).final(one.lengths)[0]
        for total, g in zip(slow, torch.autograd.grad(log_prob, weights), strict=True):
            total -= reward_of(one)[0] * g / len(rollouts)
    for a, b_ in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b_, atol=1e-6, rtol=1e-4)
    assert max(g.abs().max() for g in fast) > 1e-3


def test_clipping_cuts_the_gradient_only_where_it_would_go_further() -> None:
    ones = torch.ones(4, 1)
    batch = Experience(
        rollouts=None,  # type: ignore[arg-type]
        action=ones.bool(),
        log_q=0 * ones,
        values=0 * ones,
        advantages=torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]),
        returns=0 * ones,
    )
    log_q = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()[:, None].requires_grad_()
    loss, share = surrogate(log_q, batch, 0.2)
    (grad,) = torch.autograd.grad(loss, log_q)
    assert grad.flatten().tolist() == pytest.approx([0.0, -0.125, 0.375, 0.0])
    assert share == 0.5
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)


def train_tiny(
    lm: LanguageModel, beta: float, learning_rate: float, folder: Path
) -> tuple[Policy, Tensor, Tensor]:
    """(trained policy, its q, p_ref exp(r / 0.25) normalised), over the 155 completions of the support."""
    torch.manual_seed(0)
    policy = Policy(lm, "{x}", SUPPORT, default_lora(8))
    allowed = policy.support.allowed.nonzero().squeeze(1).tolist()
    strings = [list(s) for n in (1, 2, 3) for s in itertools.product(allowed, repeat=n)]
    reward = reward_of(policy.rollouts([ROWS[0]], [strings]))
    log_p = policy_log_probs(policy, ROWS[0])
    target = (log_p + reward / 0.25).log_softmax(0)
    config = PPOConfig(
        max_steps=100,
        num_samples=64,
        beta=beta,
        learning_rate=learning_rate,
        epochs=2,
        minibatches=1,
        whiten=False,
    )
    train_ppo(policy, [ROWS[0]], reward_of, config=config, output_dir=folder)
    return policy, policy_log_probs(policy, ROWS[0]), torch.stack([log_p, target])


@pytest.mark.slow
def test_the_fixed_point_is_the_reward_tilted_reference(one_lm: LanguageModel, tmp_path: Path) -> None:
    _, log_q, (log_p, target) = train_tiny(one_lm, 0.25, 1e-2, tmp_path)
    assert distance(log_p, target).total_variation > 0.4
    assert distance(log_q, target).total_variation < 0.15
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert len(lines) == 100
    assert lines[-1]["reward_evaluations"] == 100 * 64
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_without_the_penalty_it_collapses(one_lm: LanguageModel, tmp_path: Path) -> None:
    """The control: beta = 0 collapses to one best completion and is far from the tilted reference."""
    policy, log_q, (_, target) = train_tiny(one_lm, 0.0, 3e-3, tmp_path)
    assert distance(log_q, target).total_variation > 0.5
    assert log_q.max().exp() > 0.9
    rollouts, _ = policy.sample([ROWS[0]], 200)
    assert reward_of(rollouts).mean() > 1.4  # of at most 1.5


def test_training_moves_only_the_policy(
    one_lm: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = {k: v.clone() for k, v in one_lm.model.state_dict().items()}
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    before = {k: v.clone() for k, v in policy.named_parameters()}
    counted = BoundedReward(reward_of)
    config = PPOConfig(max_steps=2, num_samples=4, rows_per_step=2)
    assert train_ppo(policy, ROWS, counted, config=config, output_dir=tmp_path) is policy
    assert counted.evaluations == 2 * 2 * 4
    assert all(torch.equal(weights[k], v) for k, v in one_lm.model.state_dict().items())
    moved = {k for k, v in policy.named_parameters() if not torch.equal(before[k], v)}
    assert moved == {k for k, v in policy.named_parameters() if v.requires_grad}
    assert capfd.readouterr().out == ""


def test_every_row_comes_once_in_a_pass() -> None:
    rows = [{"i": i} for i in range(6)]
    steps = [rows_of_step(rows, 2, step, seed=0) for step in range(6)]
    for start in (0, 3):
        seen = sorted(row["i"] for step in steps[start : start + 3] for row in step)
        assert seen == list(range(6))
    assert steps[:3] != steps[3:]
    with pytest.raises(ConfigError, match="at least so many rows"):
        rows_of_step(rows, 7, 0, seed=0)


def test_rewards_are_bounded_counted_and_checked(one_lm: LanguageModel) -> None:
    rollouts = random_rollouts(one_lm, SUPPORT, ROWS, per_row=2)
    bounded = BoundedReward(lambda r: torch.tensor([-torch.inf, 0.0, 1.0, -7.0]), floor=-5.0)
    assert bounded(rollouts).tolist() == [-5.0, 0.0, 1.0, -5.0]
    assert bounded.evaluations == 4
    for bad in (torch.tensor([torch.nan, 0, 0, 0]), torch.tensor([torch.inf, 0, 0, 0])):
        with pytest.raises(RewardError, match="NaN or"):
            BoundedReward(lambda r, bad=bad: bad)(rollouts)
    with pytest.raises(RewardError, match="shape"):
        BoundedReward(lambda r: torch.zeros(3))(rollouts)


@pytest.mark.parametrize("bad", [{"clip": 0.0}, {"max_steps": 0}, {"minibatches": 999}, {"beta": -1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="PPO needs"):
        PPOConfig(**bad)  # type: ignore[arg-type]
