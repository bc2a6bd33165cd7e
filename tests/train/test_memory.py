"""The reward memory: the same rewards as the target's, each (row, prefix) judged once, and it survives on disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import tiny_policy
from torch import Tensor

from amortlm import LanguageModel, Support, constraint, verifier
from amortlm.errors import RewardError
from amortlm.targets.base import Scoring, Softened, Target
from amortlm.train import memory as module
from amortlm.train.memory import RewardMemory
from amortlm.types import Rollouts

ROWS = [{"x": "a b", "y": " c"}, {"x": "b", "y": " a"}]
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=4)


class Counted(Target):
    """The target, and every (row, prefix) it was asked about."""

    def __init__(self, target: Target, every_prefix: bool = True):
        self.target, self.every_prefix = target, every_prefix
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        for b, t in rollouts.stop_mask.nonzero().tolist():
            row = rollouts.rows[int(rollouts.row_index[b])]
            self.asked.append((row["x"], tuple(rollouts.tokens[b, :t].tolist())))
        return self.target.score_batch(scoring)


def infilling(lm: LanguageModel) -> Counted:
    return Counted(lm.log_prob("{z}{y}", given="{x}"))


def batches(lm: LanguageModel, count: int = 4) -> list[Rollouts]:
    """Completions of both rows, each once, that share beginnings between batches."""
    policy = tiny_policy(lm, "{x}", SUPPORT)
    return [policy.sample(ROWS, 8, seed=seed)[0].distinct()[0] for seed in range(count)]


def states_of(rollouts: Rollouts) -> set[tuple[int, tuple[int, ...]]]:
    places = rollouts.stop_mask.nonzero().tolist()
    return {(int(rollouts.row_index[b]), tuple(rollouts.tokens[b, :t].tolist())) for b, t in places}


def test_rewards_are_the_targets_and_each_prefix_is_judged_once(one_lm: LanguageModel) -> None:
    """Within a batch too: what several completions share is asked for at the first."""
    target = infilling(one_lm)
    memory, known, states = RewardMemory(target), set(), 0
    for batch in batches(one_lm):
        expected = target.target.score(batch)
        torch.testing.assert_close(memory.score(batch), expected, atol=1e-5, rtol=0)
        assert not known & set(target.asked)
        assert len(set(target.asked)) == len(target.asked)
        known |= set(target.asked)
        states += int(batch.stop_mask.sum())
        target.asked.clear()
    assert 20 < len(known) < 0.8 * states
    for batch in batches(one_lm):
        memory.score(batch)
    assert target.asked == []


def test_rows_are_told_apart(one_lm: LanguageModel) -> None:
    """The same completion of two rows has two rewards."""
    policy, target = tiny_policy(one_lm, "{x}", SUPPORT), infilling(one_lm)
    z = [[one_lm.token_id("a"), one_lm.token_id(".")]]
    memory = RewardMemory(target)
    rows = [*ROWS, {**ROWS[0], "y": " d"}, {**ROWS[0], "array": np.arange(5000)}]
    rows.append({**ROWS[0], "array": np.where(np.arange(5000) == 2500, 0, np.arange(5000))})
    for row in rows:
        rollouts = policy.rollouts([row], [z])
        torch.testing.assert_close(memory.score(rollouts), target.target.score(rollouts))
    assert len(target.asked) == len(rows)


def test_a_target_of_finished_text_is_asked_about_ends_alone(one_lm: LanguageModel) -> None:
    target = Counted(one_lm.log_prob("{z}{y}", given="{x}"), every_prefix=False)
    memory = RewardMemory(target)
    (batch,) = batches(one_lm, 1)
    torch.testing.assert_close(memory.score_final(batch), target.target.score_final(batch))
    ends = {tuple(z) for z in batch.completions()}
    assert {z for _, z in target.asked} == ends
    memory.score(batch)
    assert {z for _, z in target.asked} == ends


def test_states_that_were_masked_are_asked_about_later(one_lm: LanguageModel) -> None:
    target = infilling(one_lm)
    memory = RewardMemory(target)
    (batch,) = batches(one_lm, 1)
    memory.score(batch.final_only())
    torch.testing.assert_close(memory.score(batch), target.target.score(batch), atol=1e-5, rtol=0)


def test_impossible_stays_impossible(one_lm: LanguageModel) -> None:
    target = Counted(one_lm.log_prob("{z}", given="{x}") + constraint.contains("nowhere"))
    memory = RewardMemory(target)
    (batch,) = batches(one_lm, 1)
    for _ in range(2):
        assert (memory.score(batch)[batch.stop_mask] == -math.inf).all()
    assert len(target.asked) == len(states_of(batch))


def test_what_is_too_much_is_forgotten(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    target = infilling(one_lm)
    memory = RewardMemory(target)
    one, other = batches(one_lm, 2)
    memory.score(one)
    monkeypatch.setattr(module, "MAX_PREFIXES", len(memory) - 1)
    asked = len(target.asked)
    torch.testing.assert_close(memory.score(other), target.target.score(other), atol=1e-5, rtol=0)
    assert len(target.asked) - asked == len(states_of(other)), "all of them again"


def test_on_disk(one_lm: LanguageModel, tmp_path: Path) -> None:
    target = infilling(one_lm)
    memory = RewardMemory(target)
    (batch,) = batches(one_lm, 1)
    first = memory.score(batch)
    memory.save(tmp_path)
    again = RewardMemory(target)
    again.load(tmp_path)
    asked = len(target.asked)
    assert torch.equal(again.score(batch), first)
    assert len(target.asked) == asked
    empty = RewardMemory(target)
    empty.save(tmp_path)
    again.load(tmp_path)
    assert len(again) == 0


@pytest.mark.parametrize("name", ["memory.json", "memory.safetensors"])
def test_what_cannot_be_read_is_asked_for_again(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    memory = RewardMemory(infilling(one_lm))
    memory.score(batches(one_lm, 1)[0])
    memory.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for broken in (content[: len(content) // 2], b"{}", b"null", None):
        if broken is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(broken)
        caplog.clear()
        memory.load(tmp_path)
        assert "rewards are computed again" in caplog.text
        assert len(memory) == 0


def test_rewards_of_another_target_are_not_taken(
    one_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with a changed temperature, penalty, or prompt: an old reward would be wrong."""
    term, hard = one_lm.log_prob("{z}{y}", given="{x}"), constraint.contains("a")
    prior = one_lm.log_prob("{z}", given="{x}")
    memory = RewardMemory(Softened(term + hard, prior, 5.0))
    memory.score(batches(one_lm, 1)[0])
    memory.save(tmp_path)
    same = RewardMemory(Softened(term + hard, prior, 5.0))
    same.load(tmp_path)
    assert len(same) == len(memory)
    unlike = one_lm.log_prob("{z}", given="{y}")
    for target in (
        Softened(term / 2 + hard, prior, 5.0),
        Softened(term + hard, prior, 6.0),
        Softened(hard, prior, 5.0),
    ):
        same.target = target
        same.load(tmp_path)
        assert len(same) == 0
    assert "not of" in caplog.text
    assert repr(Softened(hard, prior, 5.0)) != repr(Softened(hard, unlike, 5.0))


def test_a_reward_that_is_no_number_is_refused(one_lm: LanguageModel) -> None:
    (batch,) = batches(one_lm, 1)
    broken = verifier(lambda texts, rows: [math.nan] * len(texts), every_prefix=True).bind(one_lm)
    with pytest.raises(RewardError, match="NaN"):
        RewardMemory(broken).score(batch)


def test_work_is_cut_to_the_memory_budget(one_lm: LanguageModel) -> None:
    target = infilling(one_lm)
    sizes = []
    target.memory_share = lambda scoring: sizes.append(len(scoring.rollouts)) or 1.0  # type: ignore[method-assign,func-returns-value]
    (batch,) = batches(one_lm, 1)
    expected = target.target.score(batch)
    torch.testing.assert_close(RewardMemory(target).score(batch), expected, atol=1e-5, rtol=0)
    assert sizes
    assert len(target.asked) == len(states_of(batch))
