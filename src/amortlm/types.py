"""The data that flows between policy, target, buffer and objective.

Shape letters, everywhere in the library: B trajectories, N prompts, K samples per prompt, T completion
tokens, V vocabulary. Logs are natural, in nats. State t means "t tokens written, then stop".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]


class DataRow(dict[str, Any]):
    """A row that caches its key, so its cells must not change."""

    @cached_property
    def key(self) -> str:
        return _key(self)


def row_key(row: Row) -> str:
    """A hash of a data row: the same on every machine, in every process and run."""
    return row.key if isinstance(row, DataRow) else _key(row)


def _key(row: Row) -> str:
    text = json.dumps(dict(row), sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A JSON value for other types: arrays as lists (their text would be shortened), anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def to_json(value: Any) -> str:
    """A line of strict JSON for values of any type: a date as text, an array as a list, NaN and infinity as null."""
    return json.dumps(finite(json.loads(json.dumps(value, default=_plain))))


def finite(value: Any) -> Any:
    """A copy with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Rollouts:
    """Completions of several prompts, padded on the right. Immutable; methods return copies.

    rows         the N prompts' data rows
    row_index    [B] long     which row a trajectory belongs to (the "group" of group objectives)
    tokens       [B, T] long  completion tokens, without the stop symbol; 0 beyond the length
    lengths      [B] long     completion lengths in tokens
    stops        [B] long     the stop token that ended each trajectory
    stop_mask    [B, T+1]     True where the support allows stopping at a state of the trajectory
    action_mask  [B, T]       True where the policy chose the token (False: padding or written by a tool)
    stop_ids     the support's stop tokens
    separator    the support's separator, where completions are lists of statements
    """

    rows: Sequence[Row]
    row_index: Tensor
    tokens: Tensor
    lengths: Tensor
    stops: Tensor
    stop_mask: Tensor
    action_mask: Tensor
    stop_ids: tuple[int, ...]
    separator: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def completions(self) -> list[list[int]]:
        """The B completions as token lists, without padding and without the stop symbol."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    def select(self, index: Tensor) -> Rollouts:
        """The trajectories at `index` ([b] long), trimmed to the longest of them."""
        lengths = self.lengths[index]
        width = max(int(lengths.max()), 1)
        used, row_index = torch.unique(self.row_index[index], return_inverse=True)
        return Rollouts(
            rows=[self.rows[i] for i in used.tolist()],
            row_index=row_index,
            tokens=self.tokens[index, :width],
            lengths=lengths,
            stops=self.stops[index],
            stop_mask=self.stop_mask[index, : width + 1],
            action_mask=self.action_mask[index, :width],
            stop_ids=self.stop_ids,
            separator=self.separator,
        )

    def distinct(self) -> tuple[Rollouts, Tensor]:
        """(each distinct completion of a row once, with the stopping states of all its copies; [B] long: the number of
        its distinct completion for each trajectory).

        Log-probabilities of a completion do not depend on its stop symbol, so one pass is enough for all copies.
        """
        key = torch.cat([self.row_index[:, None], self.lengths[:, None], self.tokens], dim=1)
        unique, place = key.unique(dim=0, return_inverse=True)
        index = torch.arange(len(self), device=place.device)
        first = torch.full_like(index[: len(unique)], len(self)).scatter_reduce(0, place, index, "amin")
        stopping = torch.zeros(len(unique), self.stop_mask.shape[1], device=place.device)
        stop_mask = stopping.index_add(0, place, self.stop_mask.float()) > 0
        return replace(self.select(first), stop_mask=stop_mask), place

    def final_only(self) -> Rollouts:
        """The same trajectories with the last state as the only stopping state."""
        states = torch.arange(self.stop_mask.shape[1], device=self.lengths.device)
        return replace(self, stop_mask=self.stop_mask & (states == self.lengths[:, None]))

    def to(self, device: torch.device | str) -> Rollouts:
        tensors: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """Join trajectories of the same rows. Trajectories of one row are next to each other in the result."""
        width = max(p.tokens.shape[1] for p in parts)
        row_index, order = torch.cat([p.row_index for p in parts]).sort(stable=True)

        def join(tensors: Sequence[Tensor], to: int | None = None) -> Tensor:
            if to is not None:
                tensors = [torch.nn.functional.pad(x, (0, to - x.shape[1])) for x in tensors]
            return torch.cat(list(tensors))[order]

        return Rollouts(
            rows=parts[0].rows,
            row_index=row_index,
            tokens=join([p.tokens for p in parts], width),
            lengths=join([p.lengths for p in parts]),
            stops=join([p.stops for p in parts]),
            stop_mask=join([p.stop_mask for p in parts], width + 1),
            action_mask=join([p.action_mask for p in parts], width),
            stop_ids=parts[0].stop_ids,
            separator=parts[0].separator,
        )


@dataclass(frozen=True)
class PolicyLogProbs:
    """log q of a batch of rollouts under the policy, renormalised on its support.

    log_pf     [B, T]    log q(z_k | z_<k); 0 where action_mask is False
    log_pterm  [B, T+1]  log q(stop | z_1:t); 0 at max_tokens (certain stop), -inf below min_tokens

    In nats.
    """

    log_pf: Tensor
    log_pterm: Tensor

    def select(self, index: Tensor) -> PolicyLogProbs:
        """The log-probabilities of the trajectories at `index` ([b] long)."""
        return PolicyLogProbs(self.log_pf[index], self.log_pterm[index])

    def final(self, lengths: Tensor) -> Tensor:
        """[B] log q(z), the log-probability of the whole trajectory and its stop. lengths [B], tokens."""
        log_pterm = self.log_pterm.gather(1, lengths[:, None]).squeeze(1)
        return self.log_pf.sum(1) + log_pterm
