"""Laws that every target obeys, as assertions for your own target: see `check_target`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amortlm.engine.model import CausalLM
from amortlm.targets.base import Target
from amortlm.types import Rollouts


def check_target(target: Target, rollouts: Rollouts, atol: float = 1e-4) -> None:
    """Assert that `target.score` is a function of (row, completion), whatever the layout of the batch.

    1. Values: finite or -inf at stopping states, 0 outside `stop_mask`.
    2. Prefixes: the score of state t of a trajectory is the score of z_1:t as a finished completion. Tested at the
       last state only if `target.every_prefix` is False.
    3. Layout: padding, order of rows and trajectories, chunks and the models' memory budgets do not change scores.

    Scores may differ by `atol` nats; -inf must stay -inf. Raises AssertionError, which names trajectory and state.
    """
    scores = target.score(rollouts)
    judged = rollouts if target.every_prefix else rollouts.final_only()
    _check_values(target, rollouts, scores)
    _check_prefixes(target, judged, scores, atol)

    def same(law: str, other: Tensor) -> None:
        _assert_same(target, judged, law, scores, other, atol)

    width = scores.shape[1]
    same("padding on the right", target.score(_pad(rollouts, 3))[:, :width])
    same("the order of the batch", _unreverse(target.score(_reverse(rollouts))))
    same("scoring each trajectory alone", _one_by_one(target, rollouts))
    with _smallest_memory(target):
        same("the memory setting", target.score(rollouts))


def _check_values(target: Target, rollouts: Rollouts, scores: Tensor) -> None:
    if scores.shape != rollouts.stop_mask.shape:
        raise AssertionError(
            f"{target!r}: scores have shape {tuple(scores.shape)}, stop_mask has {tuple(rollouts.stop_mask.shape)}"
        )
    for b, t in ((scores != 0) & ~rollouts.stop_mask).nonzero().tolist():
        raise AssertionError(
            f"{target!r}: trajectory {b} state {t} is outside stop_mask, so its score must be 0, not "
            f"{scores[b, t].item():g}"
        )
    for b, t in (torch.isnan(scores) | torch.isposinf(scores)).nonzero().tolist():
        raise AssertionError(
            f"{target!r}: trajectory {b} state {t} scores {scores[b, t].item()}; finite or -inf is allowed"
        )


def _check_prefixes(target: Target, judged: Rollouts, scores: Tensor, atol: float) -> None:
    alone = scores.clone()
    where = judged.stop_mask.nonzero()
    if len(where):
        alone[judged.stop_mask] = target.score_final(_finished(judged, where)).to(alone.dtype)
    _assert_same(target, judged, "scoring the prefix as a finished completion", scores, alone, atol)


def _finished(rollouts: Rollouts, where: Tensor) -> Rollouts:
    """For each (trajectory, state) in `where` [M, 2]: the trajectory cut at the state, which stops there."""
    b, t = where.unbind(1)
    states = torch.arange(rollouts.stop_mask.shape[1], device=t.device)
    written = states[:-1] < t[:, None]
    return replace(
        rollouts,
        row_index=rollouts.row_index[b],
        tokens=rollouts.tokens[b] * written,
        lengths=t,
        stops=rollouts.stops[b],
        stop_mask=states == t[:, None],
        action_mask=rollouts.action_mask[b] & written,
    )


def _pad(rollouts: Rollouts, by: int) -> Rollouts:
    padded: dict[str, Any] = {
        name: torch.nn.functional.pad(getattr(rollouts, name), (0, by))
        for name in ("tokens", "stop_mask", "action_mask")
    }
    return replace(rollouts, **padded)


def _reverse(rollouts: Rollouts) -> Rollouts:
    """Rows and trajectories in reverse order."""
    tensors = ("tokens", "lengths", "stops", "stop_mask", "action_mask")
    flipped = {name: getattr(rollouts, name).flip(0) for name in tensors}
    row_index = len(rollouts.rows) - 1 - rollouts.row_index.flip(0)
    return replace(rollouts, rows=list(rollouts.rows)[::-1], row_index=row_index, **flipped)


def _unreverse(scores: Tensor) -> Tensor:
    return scores.flip(0)


def _one_by_one(target: Target, rollouts: Rollouts) -> Tensor:
    out = torch.zeros(rollouts.stop_mask.shape)
    for b in range(len(rollouts)):
        score = target.score(rollouts.select(torch.tensor([b], device=rollouts.tokens.device)))
        out[b, : score.shape[1]] = score[0].to(out.device)
    return out


@contextmanager
def _smallest_memory(target: Target) -> Iterator[None]:
    """Set the memory budget of every model of the target to 0: it scores one trajectory and one branch at a time."""
    models = [term.lm for _, term in target.terms if isinstance(term.lm, CausalLM)]
    budgets = [lm.memory_mb for lm in models]
    try:
        for lm in models:
            lm.memory_mb = 0
        yield
    finally:
        for lm, budget in zip(models, budgets, strict=True):
            lm.memory_mb = budget


def _assert_same(
    target: Target, judged: Rollouts, law: str, expected: Tensor, got: Tensor, atol: float
) -> None:
    """Scores agree at the states of `judged.stop_mask`: both -inf, or within atol nats."""
    expected, got = expected.cpu(), got.cpu()
    near = (expected == got) | ((expected - got).abs() <= atol)
    for b, t in (judged.stop_mask.cpu() & ~near).nonzero().tolist():
        raise AssertionError(
            f"{target!r}: {law} changes the score of trajectory {b} {judged.completions()[b]} at state {t}: "
            f"from {expected[b, t].item():.6g} to {got[b, t].item():.6g} (allowed difference: {atol:g} nats)"
        )
