"""Supervised fine-tuning: TRL sees the policy's own tokens, and touches nothing but the policy's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import plain_ids, sequence_log_prob, tiny_policy

from amortlm.errors import DataError
from amortlm.lab.baselines.sft import LOG, examples, train_sft
from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support

pytest.importorskip("trl")

SUPPORT = Support(stop=[".", "!"], min_tokens=1, max_tokens=4)
ROWS = [{"x": "the cat"}, {"x": "a dog ran"}]
# The last completion has max_tokens tokens: its stop is sure, and not learned.
GOLD = [[" ran.", " the dog!"], ["abcd."]]


def mean_loss(policy: Policy) -> float:
    """-log p of every chosen token and stop, token by token over the whole vocabulary, averaged over tokens."""
    lm, losses, tokens = policy.lm, 0.0, 0
    for row, group in zip(ROWS, GOLD, strict=True):
        prompt = policy.encode_rows([row])[0]
        for text in group:
            ids = plain_ids(lm, text)
            ids = ids[: SUPPORT.max_tokens]
            losses -= sequence_log_prob(policy.model, [*prompt, *ids], len(prompt))
            tokens += len(ids)
    return losses / tokens


def log_likelihood(policy: Policy) -> float:
    rollouts = policy.rollouts(ROWS, GOLD)
    with torch.no_grad():
        return policy.evaluate(rollouts).final(rollouts.lengths).mean().item()


@pytest.mark.parametrize("adapter", [None, "full"])
def test_the_first_loss_is_that_of_a_hand_written_loop(
    family_lm: LanguageModel, tmp_path: Path, adapter: str | None
) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT, adapter)
    expected = mean_loss(policy)
    train_sft(policy, ROWS, GOLD, output_dir=tmp_path, max_steps=1, batch_size=3, logging_steps=1)
    first = json.loads((tmp_path / LOG).read_text().splitlines()[0])
    # TRL logs four digits or more.
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("adapter", [None, "full"])
def test_training_raises_the_likelihood_of_gold_and_leaves_the_model_alone(
    family_lm: LanguageModel, tmp_path: Path, adapter: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = family_lm
    policy = tiny_policy(lm, "{x}", SUPPORT, adapter)
    before, weights = log_likelihood(policy), {k: v.clone() for k, v in lm.model.state_dict().items()}
    config, pad = lm.model.config.to_dict(), lm.tokenizer.pad_token
    modules = [name for name, _ in policy.model.named_parameters()]

    trained = train_sft(
        policy, ROWS, GOLD, output_dir=tmp_path, max_steps=20, learning_rate=1e-2, batch_size=3
    )

    assert trained is policy
    assert log_likelihood(policy) > before + 1
    assert all(torch.equal(weights[k], v) for k, v in lm.model.state_dict().items())
    assert lm.model.config.to_dict() == config
    assert lm.tokenizer.pad_token == pad
    assert not any(p.requires_grad for p in lm.model.parameters())
    # The policy is what it was, but for its weights: no other adapter, no patched forward.
    assert [name for name, _ in policy.model.named_parameters()] == modules
    assert "forward" not in (policy.model if adapter else policy.model.get_base_model()).__dict__
    assert capfd.readouterr() == ("", "")


def test_examples_carry_the_tokens_of_the_policy(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    prompts = policy.encode_rows(ROWS)
    made = examples(policy, ROWS, GOLD)
    assert [e["input_ids"] for e in made] == [
        [*prompts[0], *plain_ids(one_lm, " ran.")],
        [*prompts[0], *plain_ids(one_lm, " the dog!")],
        [*prompts[1], *plain_ids(one_lm, "abcd.")],
    ]
    assert [sum(e["completion_mask"]) for e in made] == [2, 3, 4]
    assert made[0]["completion_mask"] == [0] * len(prompts[0]) + [1, 1]
    assert made[2]["completion_mask"] == [0] * len(prompts[1]) + [1, 1, 1, 1, 0]


def test_bad_gold_is_refused(one_lm: LanguageModel, tmp_path: Path) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    with pytest.raises(DataError, match="one list per row"):
        train_sft(policy, ROWS, [["a."]], output_dir=tmp_path)
    with pytest.raises(DataError, match="at least one"):
        train_sft(policy, ROWS, [[], []], output_dir=tmp_path)
    with pytest.raises(DataError, match="outside the support"):
        train_sft(policy, ROWS, [["abcdef."], []], output_dir=tmp_path)
