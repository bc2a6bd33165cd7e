"""PPO (Schulman et al. 2017) for policies on a support, with a per-token KL penalty to the policy it started from.

It follows the procedure of reinforcement learning from human feedback (Ziegler et al. 2019), and is written here
because no maintained implementation works with a policy on a support. A trajectory's actions are its tokens and then
the decision to stop; the forced stop at max_tokens, and tokens that a tool wrote, are no actions.

Slots: tensors [B, T+1] with the token after state t in slot t, and the stop in the slot of the final state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amortlm.data import as_rows
from amortlm.engine.packs import length_groups
from amortlm.errors import ConfigError, TrainingError
from amortlm.lab.baselines.finetune import BoundedReward, Reward, rows_of_step, working_copy, write_jsonl
from amortlm.lab.baselines.resume import EVERY, LoopState
from amortlm.policy import Policy
from amortlm.seeds import seed_of
from amortlm.types import PolicyLogProbs, Rollouts, Row

LOG = "ppo.jsonl"


@dataclass(frozen=True)
class PPOConfig:
    """One step: rows_per_step rows, num_samples completions each, `epochs` passes over them in `minibatches`.

    learning rates fall linearly to zero; beta: KL penalty, in units of the reward per nat; gamma: discount;
    lam: lambda of GAE; clip: of the probability ratio; value_clip: how far a value may move in one step
    """

    max_steps: int = 250
    rows_per_step: int = 1
    num_samples: int = 128
    epochs: int = 2
    minibatches: int = 1
    learning_rate: float = 1e-3
    value_learning_rate: float = 1e-3
    beta: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    max_grad_norm: float = 1.0
    whiten: bool = True

    def __post_init__(self) -> None:
        counts = (self.max_steps, self.rows_per_step, self.num_samples, self.epochs, self.minibatches)
        if min(counts) < 1 or self.minibatches > self.rows_per_step * self.num_samples:
            raise ConfigError("PPO needs counts of at least 1, and no more minibatches than completions")
        if self.beta < 0 or not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1 or not 0 < self.clip < 1:
            raise ConfigError("PPO needs beta >= 0, gamma in (0, 1], lam in [0, 1], clip in (0, 1)")


@dataclass(frozen=True)
class Experience:
    """Trajectories of one step. action [B, T+1] bool: slots where the policy chose; log_q, values, advantages,
    returns [B, T+1], 0 outside."""

    rollouts: Rollouts
    action: Tensor
    log_q: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, index: Tensor) -> Experience:
        rollouts = self.rollouts.select(index)
        width = rollouts.stop_mask.shape[1]
        cut = [
            x[index, :width] for x in (self.action, self.log_q, self.values, self.advantages, self.returns)
        ]
        return Experience(rollouts, *cut)


class ValueHead(nn.Module):
    """Expected return at every state, from the policy's last hidden state. The features carry no gradient, so
    fitting the values does not move the policy. Starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[B, S, H] -> [B, S]"""
        return self.out(torch.tanh(self.hidden(states.detach().float()))).squeeze(-1)


def train_ppo(
    policy: Policy,
    rows: Sequence[Row],
    reward: Reward,
    *,
    config: PPOConfig | None = None,
    output_dir: str | Path,
    seed: int = 0,
    floor: float = -100.0,
    resume: bool = False,
) -> Policy:
    """Train `policy` in place for E[reward] - beta * KL(q || policy as given), both on the support; return it.

    Its optimum is q proportional to p_ref * exp(reward / beta). reward: [B] of finished completions, such as
    `target.score_final`; -inf counts as `floor`. Writes ppo.jsonl (a line per step) into output_dir.
    resume: go on from what an interrupted run of the same settings left there.
    Raises RewardError for a reward that is NaN or +inf, TrainingError for a loss that is not finite.
    """
    config, rows = config or PPOConfig(), as_rows(rows, "rows")
    reference, bounded = working_copy(policy), BoundedReward.of(reward, floor)
    torch.manual_seed(seed)
    head = ValueHead(policy.passes.hidden_size).to(policy.device)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": weights, "lr": config.learning_rate},
            {"params": list(head.parameters()), "lr": config.value_learning_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.max_steps)
    state = LoopState(output_dir, optimizer, schedule)
    done, history = state.restore() if resume else (0, None)
    history = history or []
    bounded.evaluations += done * config.rows_per_step * config.num_samples
    for step in tqdm(range(done, config.max_steps), disable=None, desc="ppo"):
        chosen = rows_of_step(rows, config.rows_per_step, step, seed)
        rollouts, log_probs = policy.sample(chosen, config.num_samples, seed=(seed, "ppo", step))
        values_of = bounded(rollouts).to(policy.device)
        experience, metrics = assess(policy, reference, head, rollouts, log_probs, values_of, config)
        metrics |= _update(policy, head, optimizer, experience, config, seed_of((seed, "ppo", step)))
        schedule.step()
        history.append({"step": step, **metrics, "reward_evaluations": bounded.evaluations})
        if resume and (step + 1) % EVERY == 0:
            state.save(step + 1, history)
    write_jsonl(Path(output_dir) / LOG, history)
    return policy


def actions(rollouts: Rollouts, max_tokens: int) -> Tensor:
    """[B, T+1] True in the slots where the policy chose: tokens it wrote, and a stop before max_tokens."""
    slots = torch.arange(rollouts.stop_mask.shape[1], device=rollouts.lengths.device)
    stop = (slots == rollouts.lengths[:, None]) & (slots < max_tokens)
    return nn.functional.pad(rollouts.action_mask, (0, 1), value=False) | stop


def slot_log_probs(log_probs: PolicyLogProbs, rollouts: Rollouts, action: Tensor) -> Tensor:
    """[B, T+1] log q of the action in each slot, 0 where there is none."""
    slots = torch.arange(action.shape[1], device=action.device)
    tokens = nn.functional.pad(log_probs.log_pf, (0, 1))
    stop = slots == rollouts.lengths[:, None]
    chosen = torch.where(stop, log_probs.log_pterm.masked_fill(~stop, 0.0), tokens)
    return torch.where(action, chosen, 0.0)


def evaluate_with_values(
    policy: Policy, head: ValueHead, rollouts: Rollouts
) -> tuple[PolicyLogProbs, Tensor]:
    """log q of the rollouts and the value [B, T+1] of every state where there is a choice (0 at max_tokens), from the
    same passes."""
    with policy.passes.watched() as states:  # the prompts' pass, then one for each group of completions
        log_probs = policy.evaluate(rollouts)
    groups = length_groups(rollouts.lengths)
    values = states[-1].new_zeros(rollouts.stop_mask.shape, dtype=torch.float32)
    for group, hidden in zip(groups, states[-len(groups) :], strict=True):
        values[group, : hidden.shape[1]] = head(hidden)
    return log_probs, values


@torch.no_grad()
def assess(
    policy: Policy,
    reference: Policy,
    head: ValueHead,
    rollouts: Rollouts,
    log_probs: PolicyLogProbs,
    reward: Tensor,
    config: PPOConfig,
) -> tuple[Experience, dict[str, float]]:
    """Advantages and returns of fresh trajectories, and what to log: mean reward and KL(q || reference)."""
    action = actions(rollouts, policy.support.max_tokens)
    log_q = slot_log_probs(log_probs, rollouts, action)
    log_ref = slot_log_probs(reference.evaluate(rollouts), rollouts, action)
    values = torch.where(action, evaluate_with_values(policy, head, rollouts)[1], 0.0)
    rewards = config.beta * (log_ref - log_q) + _at_last_action(reward, action)
    advantages = gae(rewards, values, action, config.gamma, config.lam)
    returns = advantages + values
    if config.whiten:
        chosen = advantages[action]
        advantages = (advantages - chosen.mean()) / (chosen.std() + 1e-6) * action
    metrics = {"reward": reward.mean().item(), "kl": (log_q - log_ref).sum(1).mean().item()}
    return Experience(rollouts, action, log_q, values, advantages, returns), metrics


def _at_last_action(reward: Tensor, action: Tensor) -> Tensor:
    """[B, T+1] the reward [B] in the last slot that has an action. Trajectories without any get nothing."""
    slots = torch.arange(action.shape[1], device=action.device)
    last = (slots * action).amax(1, keepdim=True)
    return torch.where((slots == last) & action, reward[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, action: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates [B, T+1] (Schulman et al. 2016, eq. 16), 0 where there is no action.

    Slots without an action are skipped: the state after an action is that of the next action, and its value is 0
    after the last one.
    """
    out = torch.zeros_like(rewards)
    advantage, following = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(action[:, t], delta + gamma * lam * advantage, advantage)
        following = torch.where(action[:, t], values[:, t], following)
        out[:, t] = torch.where(action[:, t], advantage, 0.0)
    return out


def surrogate(log_q: Tensor, batch: Experience, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate loss (Schulman et al. 2017, eq. 7), summed over actions and averaged over
    trajectories, and the share of actions at which clipping cuts the gradient."""
    ratio = torch.where(batch.action, (log_q - batch.log_q).exp(), 1.0)
    plain, cut = ratio * batch.advantages, ratio.clamp(1 - clip, 1 + clip) * batch.advantages
    loss = -torch.where(batch.action, torch.minimum(plain, cut), 0.0).sum(1).mean()
    clipped = (cut < plain) & batch.action
    return loss, clipped.sum() / batch.action.sum().clamp(min=1)


def value_loss(values: Tensor, batch: Experience, clip: float) -> Tensor:
    """Half the mean squared error of the returns, the worse of it with and without clipping the change."""
    near = batch.values + (values - batch.values).clamp(-clip, clip)
    error = torch.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    return 0.5 * error[batch.action].mean()


def _update(
    policy: Policy,
    head: ValueHead,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPOConfig,
    seed: int,
) -> dict[str, float]:
    """Several epochs over one step's trajectories. Returns the means of losses and clip fraction over the updates.

    Raises TrainingError."""
    generator = torch.Generator().manual_seed(seed)
    groups = [group["params"] for group in optimizer.param_groups]
    seen: list[Tensor] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(experience.rollouts), generator=generator).to(policy.device)
        for index in order.chunk(config.minibatches):
            batch = experience.select(index)
            log_probs, values = evaluate_with_values(policy, head, batch.rollouts)
            log_q = slot_log_probs(log_probs, batch.rollouts, batch.action)
            loss, clipped = surrogate(log_q, batch, config.clip)
            error = value_loss(values, batch, config.value_clip)
            if not torch.isfinite(loss + error):
                raise TrainingError("the PPO loss is not finite: lower learning_rate, or raise beta or floor")
            optimizer.zero_grad()
            (loss + error).backward()
            for group in groups:
                nn.utils.clip_grad_norm_(group, config.max_grad_norm)
            optimizer.step()
            seen.append(torch.stack([loss.detach(), error.detach(), clipped]))
    mean: list[Any] = torch.stack(seen).mean(0).tolist()
    return dict(zip(("policy_loss", "value_loss", "clip_fraction"), mean, strict=True))
