"""GRPO by TRL: on the support, with our prompts, and without touching the frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import sequence_log_prob, tiny_policy
from stats import LEVEL, g_test
from torch import Tensor
from transformers import GenerationConfig

from amortlm.errors import ConfigError, DataError
from amortlm.inference.exact import enumerate_posterior, policy_log_probs
from amortlm.lab.baselines.finetune import BoundedReward
from amortlm.lab.baselines.grpo import NEUTRAL, rollout_function, tokens_and_stop, train_grpo
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.types import Rollouts

pytest.importorskip("trl")

SUPPORT = Support(stop=[".", "!"], min_tokens=1, max_tokens=3, allowed_tokens=["a", "b", "c", " cat", " ran"])
ROWS = [{"x": "the cat"}, {"x": "a dog ran"}, {"x": "a"}]


class Recorder:
    """A reward for starting with one token, that remembers what it was shown."""

    def __init__(self, policy: Policy):
        self.token = int(policy.support.allowed.nonzero()[0])
        self.seen: list[Rollouts] = []

    def __call__(self, rollouts: Rollouts) -> Tensor:
        self.seen.append(rollouts)
        return (rollouts.tokens[:, 0] == self.token).float()


def at_step(step: int) -> Any:
    """As much of a trainer as a rollout reads."""
    return SimpleNamespace(state=SimpleNamespace(global_step=step))


def mean_reward(policy: Policy, reward: Recorder) -> float:
    rollouts, _ = policy.sample(ROWS, 200, seed="test")
    return (rollouts.tokens[:, 0] == reward.token).float().mean().item()


def test_the_reward_rises_on_the_support_and_the_model_stays(
    family_lm: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = family_lm
    policy = tiny_policy(lm, "{x}", SUPPORT)
    reward = Recorder(policy)
    counted = BoundedReward(reward)
    n = 1 if "gpt2" in lm.name else 2  # TRL cannot pad prompts for absolute positions
    weights = {k: v.clone() for k, v in lm.model.state_dict().items()}
    names = [name for name, _ in policy.model.named_parameters()]
    end, pad = lm.tokenizer.eos_token, lm.tokenizer.pad_token
    before = mean_reward(policy, reward)

    trained = train_grpo(
        policy,
        ROWS,
        counted,
        output_dir=tmp_path,
        num_samples=8,
        rows_per_step=n,
        max_steps=40,
        learning_rate=2e-2,
        logging_steps=1,
    )

    assert trained is policy
    assert mean_reward(policy, reward) > before + 0.2
    assert counted.evaluations == 40 * n * 8
    for rollouts in reward.seen:
        assert all(policy.support.contains(tokens) for tokens in rollouts.completions())
        assert set(rollouts.stops.tolist()) <= set(policy.support.stop_ids)
        assert torch.bincount(rollouts.row_index).tolist() == [8] * n
    assert {row["x"] for r in reward.seen for row in r.rows} == {row["x"] for row in ROWS}
    assert all(torch.equal(weights[k], v) for k, v in lm.model.state_dict().items())
    assert [name for name, _ in policy.model.named_parameters()] == names
    assert (lm.tokenizer.eos_token, lm.tokenizer.pad_token) == (end, pad)
    assert capfd.readouterr() == ("", "")
    log = [json.loads(line) for line in (tmp_path / "grpo.jsonl").read_text().splitlines()]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is the policy as given
    assert log[-2]["kl"] > 0


def test_settings_of_the_checkpoint_reach_no_draw(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand draws at learning rate 0 follow q, whatever temperature the checkpoint names."""
    monkeypatch.setattr(one_lm.model, "generation_config", GenerationConfig(temperature=0.1, min_p=0.4))
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    reward = Recorder(policy)
    train_grpo(
        policy,
        ROWS[:1],
        reward,
        output_dir=tmp_path,
        num_samples=100,
        max_steps=10,
        learning_rate=0.0,
    )
    completions = enumerate_posterior(
        one_lm.log_prob("{z}", given="{x}"), policy.support, ROWS[0]
    ).completions
    place = {tuple(z): i for i, z in enumerate(completions)}
    drawn = torch.tensor([place[tuple(z)] for r in reward.seen for z in r.completions()])
    law = policy_log_probs(policy, ROWS[0]).exp()
    assert g_test(torch.bincount(drawn, minlength=len(law)), law) > LEVEL
    assert g_test(torch.bincount(drawn, minlength=len(law)), law**2) < LEVEL  # control: a colder law


def test_nothing_bends_the_sampling(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neutral settings reach TRL."""
    import trl

    made: list[Any] = []
    trainer_class = trl.GRPOTrainer
    monkeypatch.setattr(trainer_class, "train", lambda self, **_: made.append(self))
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    train_grpo(policy, ROWS, Recorder(policy), output_dir=tmp_path)
    (trainer,) = made
    assert {name: getattr(trainer.args, name) for name in NEUTRAL} == NEUTRAL
    config = trainer.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)


def test_rollouts_are_those_of_the_policy(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    out = rollout_function(policy, ROWS, BoundedReward(Recorder(policy)), seed=5)(
        ["2"] * 4 + ["0"] * 4, at_step(0)
    )
    drawn, _ = policy.sample([ROWS[2], ROWS[0]], 4, seed=(5, "grpo", 0))
    assert out["completion_ids"] == [tokens_and_stop(policy, drawn, i) for i in range(8)]
    prompts = policy.encode_rows(ROWS)
    assert out["prompt_ids"] == [prompts[2]] * 4 + [prompts[0]] * 4
    for ids, mask, length in zip(out["completion_ids"], out["env_mask"], drawn.lengths.tolist(), strict=True):
        assert mask == [1] * len(ids)
        # The stop that is sure after max_tokens is no action.
        assert (ids[-1] in policy.support.stop_ids) == (length < 3)
        assert len(ids) == min(length + 1, 3)


def test_tokens_of_a_tool_leave_the_loss(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    sample = policy.sample

    def with_tool(*args: Any, **kwargs: Any) -> Any:
        drawn, log_probs = sample(*args, **kwargs)
        mask = drawn.action_mask.clone()
        mask[:, 0] = False
        return replace(drawn, action_mask=mask), log_probs

    monkeypatch.setattr(policy, "sample", with_tool)
    out = rollout_function(policy, ROWS, BoundedReward(Recorder(policy)), seed=0)(["0"] * 6, at_step(0))
    assert all(mask == [0] + [1] * (len(mask) - 1) for mask in out["env_mask"])


def test_the_log_probabilities_are_the_models(
    family_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TRL differentiates is log p over the whole vocabulary of prompt, completion and stop."""
    import trl

    made: list[Any] = []
    trainer_class = trl.GRPOTrainer
    monkeypatch.setattr(trainer_class, "train", lambda self, **_: made.append(self))
    policy = tiny_policy(family_lm, "{x}", SUPPORT)
    train_grpo(policy, ROWS, Recorder(policy), output_dir=tmp_path)
    prompt, ids = policy.encode_rows(ROWS)[1], policy.parse("ab.")[0]
    tokens = torch.tensor([[*prompt, *ids]])
    log_p, _, _ = made[0]._get_per_token_logps_and_entropies(
        made[0].model, tokens, torch.ones_like(tokens), len(ids)
    )
    assert log_p.sum().item() == pytest.approx(
        sequence_log_prob(policy.model, tokens[0].tolist(), len(prompt)), abs=1e-4
    )


def test_an_empty_row_and_a_hard_reward_work(one_lm: LanguageModel, tmp_path: Path) -> None:
    policy = tiny_policy(one_lm, "the cat", SUPPORT)
    start = [p.clone() for p in policy.parameters() if p.requires_grad]

    def reward(rollouts: Rollouts) -> Tensor:
        return torch.where(rollouts.lengths == 2, 0.0, -torch.inf)

    train_grpo(policy, [{}], reward, output_dir=tmp_path, num_samples=8, max_steps=2, floor=-3.0)
    moved = [p for p in policy.parameters() if p.requires_grad]
    assert all(torch.isfinite(p).all() for p in moved)
    assert any(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))


def test_settings_that_cannot_work_are_refused(one_lm: LanguageModel, tmp_path: Path) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    reward = Recorder(policy)
    for settings, error, message in (
        ({"num_samples": 1}, ConfigError, "at least 2"),
        ({"rows_per_step": 4}, DataError, "rows_per_step=4"),
    ):
        with pytest.raises(error, match=message):
            train_grpo(policy, ROWS, reward, output_dir=tmp_path, **settings)  # type: ignore[arg-type]
    full = tiny_policy(one_lm, "{x}", SUPPORT, "full")
    with pytest.raises(ConfigError, match="full copy"):
        train_grpo(full, ROWS, reward, output_dir=tmp_path)


def test_prompts_are_not_padded_for_absolute_positions(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    """TRL gives no position ids: with GPT-2, the shorter of two prompts would be read at shifted positions."""
    rows = [{"x": "the cat"}, {"x": "a dog ran, the cat ran"}]
    for name, refused in (("gpt2-tied", True), ("llama-untied", False), ("gpt_neox-untied", False)):
        policy = tiny_policy(models[name], "{x}", SUPPORT)
        given = {"output_dir": tmp_path, "num_samples": 2, "rows_per_step": 2, "max_steps": 1}
        if refused:
            with pytest.raises(ConfigError, match="rows_per_step=1"):
                train_grpo(policy, rows, Recorder(policy), **given)  # type: ignore[arg-type]
            train_grpo(policy, [rows[0], rows[0]], Recorder(policy), **given)  # type: ignore[arg-type]
        else:
            train_grpo(policy, rows, Recorder(policy), **given)  # type: ignore[arg-type]
