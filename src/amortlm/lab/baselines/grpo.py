"""GRPO by TRL's public trainer, on a policy's support and with any reward on rollouts.

Completions are drawn by `policy.sample`, through TRL's `rollout_func` (which TRL calls experimental). The forced stop
after max_tokens and tokens that a tool wrote are no actions and do not enter the loss.

What differs from our q: TRL's log-probabilities are over the whole vocabulary, not renormalised on the support,
and a stop is the symbol that was drawn, not any of them. The gradient of log p is that of log q plus that of the
log mass of the support. So the surrogate also moves that mass, on which q does not depend, and the KL penalty
also keeps it near its first value. This matters only where a support cuts off much of the model's mass (few
allowed tokens, a likely stop below min_tokens): there the penalty is not the KL of q. On `numbers`, whose support
leaves out special tokens only, there is no difference. The reference is a frozen copy of the adapter as given.

A step takes about three times as long as one of `GFNTrainer` with as many completions: TRL repeats the prompt for each
completion in three passes (reference, forward, backward), and off a GPU projects its tokens on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from amortlm.data import as_rows
from amortlm.errors import ConfigError, DataError
from amortlm.lab.baselines.finetune import (
    BoundedReward,
    Reward,
    adopt_weights,
    quiet,
    rows_of_step,
    run_trl,
    trl,
    trl_settings,
    working_copy,
)
from amortlm.lab.baselines.sft import padded_tokenizer
from amortlm.policy import Policy
from amortlm.types import Rollouts, Row

# To sample from the policy itself, every field that could change the distribution is neutral.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


def train_grpo(
    policy: Policy,
    rows: Sequence[Row],
    reward: Reward,
    *,
    output_dir: str | Path,
    num_samples: int = 16,
    rows_per_step: int = 1,
    max_steps: int = 250,
    learning_rate: float = 1e-3,
    beta: float = 0.01,
    seed: int = 0,
    floor: float = -100.0,
    resume: bool = False,
    **settings: Any,
) -> Policy:
    """Train `policy` in place for expected reward minus beta * KL to the policy as given, and return it (Shao et al.
    2024).

    reward      [B] of finished completions, such as `target.score_final`; -inf counts as `floor`
    beta        weight of the KL of each token, in a loss whose advantages are divided by the standard deviation of the
                group's rewards (`scale_rewards="none"` leaves them)
    one step    rows_per_step rows with num_samples completions each, all judged once
    resume      go on from what an interrupted run of the same settings left in output_dir
    settings    further fields of `trl.GRPOConfig`

    Writes grpo.jsonl into output_dir. Raises ConfigError for settings that TRL cannot honour,
    RewardError for a reward that is NaN or +inf.
    """
    rows = as_rows(rows, "rows")
    _check(policy, rows, num_samples, rows_per_step, beta)
    trained, bounded = working_copy(policy), BoundedReward.of(reward, floor)
    given = trl_settings(policy, output_dir, seed, resume) | {
        **NEUTRAL,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "beta": beta,
        "num_generations": num_samples,
        "per_device_train_batch_size": num_samples * rows_per_step,
        "max_completion_length": policy.support.max_tokens,
        "logging_steps": 10,
        "shuffle_dataset": False,
    }
    with quiet():
        trainer = _trainer(trained, rows, bounded, rows_per_step, seed, given | settings)
        start = run_trl(trainer, Path(output_dir) / "grpo.jsonl", resume)
    bounded.evaluations += start * num_samples * rows_per_step
    return adopt_weights(policy, trained)


def _trainer(
    policy: Policy,
    rows: Sequence[Row],
    reward: BoundedReward,
    rows_per_step: int,
    seed: int,
    given: dict[str, Any],
) -> Any:
    """TRL's trainer of the policy. given: fields of its config."""
    config_class, trainer_class = trl("GRPOConfig", "GRPOTrainer")
    from datasets import Dataset

    # TRL hands prompts back to our functions, which know the rows by number. All steps are a single pass over this
    # data set: the order of a later pass would depend on whether the run was interrupted.
    numbers = range(len(rows))
    steps = (rows_of_step(numbers, rows_per_step, step, seed) for step in range(given["max_steps"]))
    prompts = [str(number) for step in steps for number in step]

    return trainer_class(
        model=policy.model,
        reward_funcs=carried_reward,
        args=config_class(**given),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=padded_tokenizer(policy),
        rollout_func=rollout_function(policy, rows, reward, seed),
    )


def _check(policy: Policy, rows: Sequence[Row], num_samples: int, rows_per_step: int, beta: float) -> None:
    if num_samples < 2:
        raise ConfigError("GRPO compares samples of one row: num_samples must be at least 2")
    if not 1 <= rows_per_step <= len(rows):
        raise DataError(f"rows_per_step={rows_per_step} needs at least so many rows, got {len(rows)}")
    if policy.is_full and beta > 0:
        raise ConfigError(
            "TRL reloads the reference of a full copy from the hub name; train LoRA, or set beta=0"
        )
    prompts = policy.encode_rows(rows)
    if (
        rows_per_step > 1
        and len({len(p) for p in prompts}) > 1
        and policy.passes.has_absolute_positions(prompts[0])
    ):
        # TRL pads prompts on the left and gives no position ids, which shifts the positions of the shorter ones.
        raise ConfigError(
            f"{policy.lm.name} has absolute positions, and TRL miscounts them when prompts of different lengths "
            "share a step: set rows_per_step=1"
        )


def rollout_function(
    policy: Policy, rows: Sequence[Row], reward: BoundedReward, seed: int
) -> Callable[[list[str], Any], dict[str, list[Any]]]:
    """TRL's `rollout_func`: prompts are row numbers, each repeated for its samples, which stand together.

    The reward judges the very rollouts that were drawn; TRL carries it to `carried_reward`.
    """
    prompt_ids = policy.encode_rows(rows)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        numbers = [int(p) for p in prompts]
        order = list(dict.fromkeys(numbers))
        counts = [numbers.count(n) for n in order]
        step = trainer.state.global_step
        drawn, _ = policy.sample([rows[n] for n in order], counts, seed=(seed, "grpo", step))
        actions = [tokens_and_stop(policy, drawn, i) for i in range(len(drawn))]
        chosen = torch.nn.functional.pad(drawn.action_mask, (0, 1), value=True).int()
        chosen = chosen.scatter(1, drawn.lengths[:, None], 1)  # the stop
        return {
            "prompt_ids": [prompt_ids[n] for n in numbers],
            "completion_ids": actions,
            # Log-probabilities of the sampler: TRL reads them only to correct for vLLM.
            "logprobs": [[0.0] * len(a) for a in actions],
            "env_mask": [mask[: len(a)] for mask, a in zip(chosen.tolist(), actions, strict=True)],
            "judged": reward(drawn).tolist(),
        }

    return rollout


def carried_reward(judged: list[float], **_: Any) -> list[float]:
    """TRL's reward function beside `rollout_function`."""
    return judged


def tokens_and_stop(policy: Policy, rollouts: Rollouts, i: int) -> list[int]:
    """Tokens of trajectory i and its stop symbol, without the stop that is sure after max_tokens."""
    length = int(rollouts.lengths[i])
    tokens = rollouts.tokens[i, :length].tolist()
    return tokens if length >= policy.support.max_tokens else [*tokens, int(rollouts.stops[i])]
