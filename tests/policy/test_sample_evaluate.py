"""Law 4: sample, evaluate and a slow loop give the same log q, whatever the batch, the adapter and the mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import random_rollouts, slow_log_q, tiny_policy

from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.policy.laws import check_policy
from amortlm.support import Support
from amortlm.types import PolicyLogProbs, Rollouts

# Prompts of different lengths, one of a single token: the batch is padded on the left.
ROWS = [{"x": "the dog ran, the cat ran."}, {"x": ""}, {"x": "a"}]
SUPPORT = Support(stop=(".", "!"), min_tokens=2, max_tokens=6)


def assert_same(rollouts: Rollouts, a: PolicyLogProbs, b: PolicyLogProbs, atol: float = 1e-4) -> None:
    pf, pterm = rollouts.action_mask, rollouts.stop_mask
    torch.testing.assert_close(a.log_pf[pf], b.log_pf[pf], atol=atol, rtol=0)
    torch.testing.assert_close(a.log_pterm[pterm], b.log_pterm[pterm], atol=atol, rtol=0)


def test_one_of_the_prompts_is_a_single_token(lm: LanguageModel) -> None:
    policy = tiny_policy(lm, "{x}", SUPPORT)
    assert min(map(len, policy.encode_rows(ROWS))) == 1


def test_sample_evaluate_and_batches_agree(lm: LanguageModel) -> None:
    check_policy(tiny_policy(lm, "{x}", SUPPORT), ROWS)


def test_single_token_prompts_alone_agree(lm: LanguageModel) -> None:
    """No prompt cache at all."""
    check_policy(tiny_policy(lm, "{x}", SUPPORT), ROWS[1:2])


@pytest.mark.parametrize("adapter", [None, "full"])
def test_evaluate_equals_a_plain_pass_per_state(lm: LanguageModel, adapter: str | None) -> None:
    policy = tiny_policy(lm, "{x}", SUPPORT, adapter)
    rollouts = random_rollouts(lm, SUPPORT, ROWS, per_row=2)
    log_probs = policy.evaluate(rollouts)
    prompts = policy.encode_rows(ROWS)
    for b, z in enumerate(rollouts.completions()):
        log_pf, log_pterm = slow_log_q(policy, prompts[rollouts.row_index[b]], z)
        n = len(z)
        torch.testing.assert_close(log_probs.log_pf[b, :n], torch.tensor(log_pf), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            log_probs.log_pterm[b, : n + 1], torch.tensor(log_pterm), atol=1e-4, rtol=0
        )
        assert (log_probs.log_pf[b, n:] == 0).all()
    total = log_probs.final(rollouts.lengths)
    n = rollouts.lengths[0]
    torch.testing.assert_close(total[0], log_probs.log_pf[0, :n].sum() + log_probs.log_pterm[0, n])


def test_stopping_is_impossible_then_possible_then_sure(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", min_tokens=2, max_tokens=4))
    tokens = one_lm.encode_continuation(" a cat a dog")
    rollouts = policy.rollouts(ROWS[:1], [[tokens]])
    log_pterm = policy.evaluate(rollouts).log_pterm[0]
    assert torch.isneginf(log_pterm[:2]).all()
    assert (log_pterm[2:4] < 0).all()
    assert torch.isfinite(log_pterm[2:4]).all()
    assert log_pterm[4] == 0
    assert rollouts.stop_mask[0].tolist() == [False, False, True, True, True]


def gradients(policy: Policy, rollouts: Rollouts) -> list[torch.Tensor]:
    policy.zero_grad()
    log_probs = policy.evaluate(rollouts)
    (log_probs.final(rollouts.lengths).sum() + log_probs.log_pterm[rollouts.stop_mask].sum()).backward()
    return [p.grad.clone() for p in policy.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("adapter", [None, "full"])
def test_activation_checkpointing_changes_neither_values_nor_gradients(
    family_lm: LanguageModel, adapter: str | None
) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT, adapter)
    rollouts, sampled = policy.sample(ROWS, 3)
    plain = gradients(policy, rollouts)
    policy.activation_checkpointing_enable()
    policy.train()
    assert_same(rollouts, policy.evaluate(rollouts), sampled)
    checkpointed = gradients(policy, rollouts)
    assert len(checkpointed) == len(plain) > 0
    assert any(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    again, log_probs = policy.sample(ROWS, 3)
    assert again.completions() == rollouts.completions()
    assert_same(rollouts, log_probs, sampled)
    assert policy.training, "sampling leaves train mode as it found it"


def test_train_mode_has_no_dropout(family_lm: LanguageModel) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT).train()
    rollouts, sampled = policy.sample(ROWS, 3)
    assert_same(rollouts, policy.evaluate(rollouts), sampled)


def test_gradients_are_finite_on_every_support(one_lm: LanguageModel) -> None:
    for low, high in ((0, 1), (0, 3), (3, 3)):
        support = Support(stop=".", min_tokens=low, max_tokens=high, allowed_tokens=(" a", " cat"))
        policy = tiny_policy(one_lm, "{x}", support)
        rollouts, _ = policy.sample(ROWS, 4)
        assert all(torch.isfinite(g).all() for g in gradients(policy, rollouts))


def test_forced_tokens_have_no_log_probability(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    rollouts, _ = policy.sample(ROWS[:1], 1)
    before = policy.evaluate(rollouts)
    rollouts.action_mask[0, 1] = False
    after = policy.evaluate(rollouts)
    assert before.log_pf[0, 1] < 0
    assert after.log_pf[0, 1] == 0
    torch.testing.assert_close(after.log_pf[0, 0], before.log_pf[0, 0])


def test_the_same_seed_and_row_give_the_same_completions(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    first = policy.sample(ROWS, 4, seed=(5, "step"))[0]
    assert policy.sample(ROWS, 4, seed=(5, "step"))[0].completions() == first.completions()
    assert policy.sample(ROWS, 4, seed=(6, "step"))[0].completions() != first.completions()
    reverse = policy.sample(ROWS[::-1], 4, seed=(5, "step"))[0].completions()
    assert reverse[8:] == first.completions()[:4]


def test_a_count_for_every_row(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    rollouts, _ = policy.sample(ROWS, [2, 0, 3])
    assert rollouts.row_index.tolist() == [0, 0, 2, 2, 2]
    assert rollouts.completions()[:2] == policy.sample(ROWS, 2)[0].completions()[:2]


def test_the_frozen_model_is_not_touched(one_lm: LanguageModel) -> None:
    ids = torch.tensor([[3, 4, 5]])
    before = one_lm.model(ids).logits
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    gradients(policy, policy.sample(ROWS, 2)[0])
    torch.testing.assert_close(one_lm.model(ids).logits, before, atol=0, rtol=0)
    assert not any(p.requires_grad or p.grad is not None for p in one_lm.model.parameters())
    assert not any("lora" in name for name, _ in one_lm.model.named_parameters())
    shared = {p.data_ptr() for p in one_lm.model.parameters()}
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} == shared, "LoRA shares the frozen weights"


def test_a_saved_adapter_gives_the_same_log_q(family_lm: LanguageModel, tmp_path: Path) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORT)
    rollouts, _ = policy.sample(ROWS, 2)
    expected = policy.evaluate(rollouts)
    policy.save_adapter(tmp_path)
    loaded = Policy(family_lm, "{x}", SUPPORT, adapter=tmp_path)
    assert_same(rollouts, loaded.evaluate(rollouts), expected, atol=0)
    fresh = tiny_policy(family_lm, "{x}", SUPPORT)
    for p in fresh.parameters():
        if p.requires_grad:
            p.data.zero_()
    fresh.load_adapter(tmp_path)
    assert_same(rollouts, fresh.evaluate(rollouts), expected, atol=0)


def test_embedded_model(embedded: LanguageModel) -> None:
    rows = [{"x": "Once upon a time"}, {"x": "The dog"}]
    check_policy(tiny_policy(embedded, "{x}", Support(stop=".", max_tokens=8)), rows, num_samples=4)
