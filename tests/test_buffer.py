"""The replay buffer: what stays in it, how it is drawn from, and that it survives on disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from stats import LEVEL, g_test

from amortlm.buffer import Entry, ReplayBuffer, near_duplicates
from amortlm.engine.prefix import pad_right
from amortlm.errors import CheckpointError
from amortlm.types import Rollouts, Row, row_key

ROW: Row = {"x": "the dog"}
OTHER: Row = {"x": "a cat"}
KEY = row_key(ROW)
STOP = 28


def rollouts_of(
    completions: Sequence[Sequence[int]], rows: Sequence[Row] = (ROW,), index: Sequence[int] | None = None
) -> Rollouts:
    tokens, lengths = pad_right([list(c) for c in completions], "cpu")
    mask = torch.ones(len(tokens), tokens.shape[1] + 1, dtype=torch.bool)
    return Rollouts(
        rows=rows,
        row_index=torch.tensor(index or [0] * len(tokens)),
        tokens=tokens,
        lengths=lengths,
        stops=torch.full((len(tokens),), STOP),
        stop_mask=mask,
        action_mask=mask[:, 1:],
        stop_ids=(STOP,),
    )


def offer(buffer: ReplayBuffer, *offered: tuple[Sequence[int], float], row: Row = ROW) -> None:
    """Add completions with their rewards, in this order."""
    rewards = torch.tensor([reward for _, reward in offered], dtype=torch.float64)
    buffer.add(rollouts_of([z for z, _ in offered], [row]), rewards)


def stored(buffer: ReplayBuffer, row: Row = ROW) -> dict[tuple[int, ...], float]:
    return {e.tokens: e.log_reward for e in buffer.entries(row_key(row))}


def apart(i: int) -> list[int]:
    """Completions that share no token."""
    return [10 * i, 10 * i + 1, 10 * i + 2]


# What stays


def test_the_best_rewards_stay_whatever_their_order() -> None:
    rewards = [-4.0, -1.0, -7.0, -3.0, -2.0, -6.0, -5.0]
    for order in (range(7), range(6, -1, -1)):
        buffer = ReplayBuffer(capacity=3)
        offer(buffer, *((apart(i), rewards[i]) for i in order))
        assert stored(buffer) == {tuple(apart(i)): rewards[i] for i in (1, 4, 3)}
        assert [e.log_reward for e in buffer.entries(KEY)] == [-3.0, -2.0, -1.0], "worst first"
        assert len(buffer) == 3


def test_the_capacity_is_per_prompt() -> None:
    buffer = ReplayBuffer(capacity=2)
    completions = [apart(i) for i in range(6)]
    rollouts = rollouts_of(completions, [ROW, OTHER], index=[0, 1, 0, 1, 1, 0])
    buffer.add(rollouts, torch.arange(6.0))
    assert stored(buffer) == {tuple(apart(2)): 2.0, tuple(apart(5)): 5.0}
    assert stored(buffer, OTHER) == {tuple(apart(3)): 3.0, tuple(apart(4)): 4.0}
    assert len(buffer) == 4


def test_a_buffer_of_size_zero_stores_nothing() -> None:
    buffer = ReplayBuffer(capacity=0)
    offer(buffer, (apart(1), 0.0), (apart(2), 1.0))
    assert len(buffer) == 0
    assert buffer.draw(KEY, 3, torch.Generator()) == []


def test_an_entry_keeps_tokens_stop_and_reward_without_padding() -> None:
    buffer = ReplayBuffer()
    offer(buffer, ([5, 6, 7, 8, 9], -1.5), ([20], -2.5))
    assert list(buffer.entries(KEY)) == [Entry(-2.5, (20,), STOP), Entry(-1.5, (5, 6, 7, 8, 9), STOP)]


def test_what_is_impossible_or_undefined_is_not_stored() -> None:
    buffer = ReplayBuffer(capacity=1)
    offer(buffer, (apart(1), -math.inf), (apart(2), math.nan))
    assert len(buffer) == 0
    offer(buffer, (apart(3), -1e30))
    offer(buffer, (apart(4), -math.inf))
    assert list(stored(buffer)) == [tuple(apart(3))]


@pytest.mark.parametrize(("first", "second"), [(-2.0, -1.0), (-1.0, -2.0), (-1.0, -1.0)])
def test_an_exact_duplicate_is_stored_once_with_the_better_reward(first: float, second: float) -> None:
    buffer = ReplayBuffer()
    offer(buffer, ([1], first), ([1], second))
    assert stored(buffer) == {(1,): -1.0}
    empty = ReplayBuffer()
    offer(empty, ([], first), ([], second))
    assert stored(empty) == {(): -1.0}


BASE = [1, 2, 3, 4, 5]
NEAR_CASES = [
    (BASE, [1, 2, 3, 8, 9], True, "two of five replaced: 2 < 2.5"),
    (BASE, [1, 2, 7, 8, 9], False, "three of five replaced: 3 > 2.5"),
    (BASE, [9, 1, 2, 3, 4, 5], True, "one inserted: 1 < 2.75"),
    (BASE, [9, 9, 1, 2, 3, 4, 5, 9], True, "three inserted: 3 < 3.25"),
    (BASE, [9, 9, 1, 2, 3, 4, 5, 9, 9], False, "four inserted: 4 > 3.5"),
    (BASE, [2, 3, 4, 5, 1], True, "rotated by one: 2 < 2.5"),
    (BASE, [3, 4, 5, 1, 2], False, "rotated by two: 4 > 2.5"),
    ([*BASE, 6], [1, 2, 3, 7, 8, 9], False, "three of six replaced: 3 is not below 3"),
    ([1, 2, 3] * 4, [1, 2, 3] * 3 + [7, 8, 9, 7, 8], True, "5 of 12 and 14: 5 < 6.5"),
    ([1, 2, 3] * 4, [1, 2, 3] * 2 + [7, 8, 9, 7, 8, 9], False, "6 of 12 and 12: 6 is not below 6"),
    (BASE, [1, 2, 3, 4], False, "fewer than five tokens: only equal ones are near"),
    ([1, 2, 3, 4], [1, 2, 3, 9], False, "four tokens, one replaced"),
    ([1], [2], False, "single tokens"),
    ([], [1], False, "the empty completion"),
    ([55300, 60000, 57000, 55299, 7], [55300, 60000, 57001, 55299, 7], True, "ids that are no characters"),
    (
        [55300, 60000, 57000, 55299, 7],
        [55301, 60001, 57001, 55299, 7],
        False,
        "ids that are no characters, apart",
    ),
]


@pytest.mark.parametrize(("a", "b", "near", "why"), NEAR_CASES, ids=[case[3] for case in NEAR_CASES])
def test_near_duplicates_are_below_a_quarter_of_the_summed_lengths(
    a: list[int], b: list[int], near: bool, why: str
) -> None:
    one, two = Entry(0.0, tuple(a), STOP), Entry(-1.0, tuple(b), STOP)
    assert near_duplicates(one, [two]) == [two] * near
    assert near_duplicates(two, [one]) == [one] * near
    for order in ([(a, -1.0), (b, -2.0)], [(b, -2.0), (a, -1.0)]):
        buffer = ReplayBuffer()
        offer(buffer, *order)
        expected = {tuple(a): -1.0} if near else {tuple(a): -1.0, tuple(b): -2.0}
        assert stored(buffer) == expected


def test_one_better_completion_replaces_all_its_near_duplicates() -> None:
    buffer = ReplayBuffer()
    left, right, middle = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6, 9, 9]
    offer(buffer, (left, -3.0), (right, -2.0), (apart(5), -9.0))
    assert len(buffer) == 3, "left and right differ in 4 of 8 tokens: not near"
    offer(buffer, (middle, -2.5))
    assert tuple(middle) not in stored(buffer), "worse than one of its near-duplicates"
    offer(buffer, (middle, -1.0))
    assert stored(buffer) == {tuple(middle): -1.0, tuple(apart(5)): -9.0}


def test_near_duplicates_of_other_prompts_do_not_matter() -> None:
    buffer = ReplayBuffer()
    offer(buffer, (BASE, -1.0))
    offer(buffer, (BASE, -2.0), row=OTHER)
    assert stored(buffer, OTHER) == {tuple(BASE): -2.0}


# Drawing

REWARDS = [0.0, -0.5, -1.0, -2.0]
DRAWS = 4000


def filled(prioritized: bool) -> ReplayBuffer:
    buffer = ReplayBuffer(prioritized=prioritized)
    offer(buffer, *((apart(i), reward) for i, reward in enumerate(REWARDS)))
    return buffer


def draw_counts(buffer: ReplayBuffer, count: int) -> Counter[tuple[int, ...]]:
    """How often each ordered draw of numbers of completions comes up."""
    generator = torch.Generator().manual_seed(5)
    return Counter(tuple(e.tokens[0] // 10 for e in buffer.draw(KEY, count, generator)) for _ in range(DRAWS))


@pytest.mark.parametrize("prioritized", [True, False])
def test_draws_follow_the_rewards_or_are_uniform(prioritized: bool) -> None:
    """False-alarm rate: `LEVEL`. The other law is the negative control."""
    counts = draw_counts(filled(prioritized), 1)
    seen = torch.tensor([counts[(i,)] for i in range(4)])
    by_reward, uniform = torch.tensor(REWARDS).softmax(0), torch.full((4,), 0.25)
    right, wrong = (by_reward, uniform) if prioritized else (uniform, by_reward)
    assert g_test(seen, right) > LEVEL
    assert g_test(seen, wrong) < LEVEL


def test_pairs_are_drawn_without_replacement() -> None:
    """P(i, then j) = p_i p_j / (1 - p_i). False-alarm rate: `LEVEL`."""
    counts = draw_counts(filled(True), 2)
    p = torch.tensor(REWARDS).softmax(0).tolist()
    pairs = list(permutations(range(4), 2))
    assert set(counts) <= set(pairs)
    expected = torch.tensor([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert g_test(torch.tensor([counts[pair] for pair in pairs]), expected) > LEVEL


def test_more_than_there_is_gives_everything_once() -> None:
    buffer = filled(True)
    drawn = buffer.draw(KEY, 50, torch.Generator().manual_seed(0))
    assert sorted(drawn) == list(buffer.entries(KEY))
    assert buffer.draw(KEY, 0, torch.Generator()) == []
    assert buffer.draw("an unknown key", 3, torch.Generator()) == []


def test_rewards_far_apart_do_not_underflow() -> None:
    buffer = ReplayBuffer()
    offer(buffer, (apart(1), -1000.0), (apart(2), -2000.0), (apart(3), -3000.0))
    for seed in range(5):
        drawn = buffer.draw(KEY, 2, torch.Generator().manual_seed(seed))
        assert [e.log_reward for e in drawn] == [-1000.0, -2000.0]


def test_a_draw_is_a_function_of_the_generator() -> None:
    buffer = filled(True)

    def sequence(seed: int) -> list[list[Entry]]:
        generator = torch.Generator().manual_seed(seed)
        torch.rand(3)  # the global generator plays no part
        return [buffer.draw(KEY, 2, generator) for _ in range(10)]

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)


# On disk


def saved(tmp_path: Path) -> ReplayBuffer:
    buffer = filled(True)
    offer(buffer, ([7], 1 / 3), ([], -1e-12), row=OTHER)
    buffer.save(tmp_path)
    return buffer


def test_a_saved_buffer_is_the_same_and_draws_the_same(tmp_path: Path) -> None:
    buffer = saved(tmp_path)
    loaded = ReplayBuffer()
    offer(loaded, (apart(8), 5.0))
    loaded.load(tmp_path)
    for key in (KEY, row_key(OTHER)):
        assert list(loaded.entries(key)) == list(buffer.entries(key))
    assert len(loaded) == len(buffer), "what was in the buffer before is gone"
    draws = [b.draw(KEY, 3, torch.Generator().manual_seed(9)) for b in (buffer, loaded)]
    assert draws[0] == draws[1]
    assert {p.name for p in tmp_path.iterdir()} == {"buffer.json", "buffer.safetensors"}


def test_an_empty_buffer_survives(tmp_path: Path) -> None:
    ReplayBuffer().save(tmp_path)
    loaded = filled(True)
    loaded.load(tmp_path)
    assert len(loaded) == 0
    offer(loaded, (apart(1), 0.0))
    assert len(loaded) == 1


@pytest.mark.parametrize("name", ["buffer.safetensors", "buffer.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, None], ids=["empty", "head", "last byte", "missing"])
def test_a_buffer_that_was_cut_short_says_what_to_do(tmp_path: Path, name: str, share: float | None) -> None:
    saved(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    if share is None:
        file.unlink()
    else:
        file.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    loaded = filled(False)
    before = stored(loaded)
    with pytest.raises(
        CheckpointError, match="replay buffer is incomplete .*resume from an earlier checkpoint"
    ):
        loaded.load(tmp_path)
    assert stored(loaded) == before, "a failed load changes nothing"


@pytest.mark.parametrize("change", [1, -1])
def test_files_of_different_saves_are_refused(tmp_path: Path, change: int) -> None:
    saved(tmp_path)
    file = tmp_path / "buffer.json"
    counts = json.loads(file.read_text())
    counts[KEY] += change
    file.write_text(json.dumps(counts))
    with pytest.raises(CheckpointError, match="replay buffer is incomplete"):
        ReplayBuffer().load(tmp_path)
