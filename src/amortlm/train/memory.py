"""What the target has said of every stopping state so far."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amortlm.errors import CheckpointError
from amortlm.targets.base import Scoring, Target
from amortlm.types import Rollouts, row_key

MAX_STATES = 2**20  # about 200 MB


class RewardMemory(Target):
    """`target`, asked about each (row, prefix) once: a reward does not change while q is trained.

    A sharp policy that comes back to a prompt writes the same beginnings again. States are numbered, and the number of
    (state, token) is looked up, so a prefix costs one look-up a token. Beyond `MAX_STATES` everything is forgotten.
    """

    def __init__(self, target: Target):
        self.target = target
        self.every_prefix, self.columns = target.every_prefix, target.columns
        self.clear()

    def clear(self) -> None:
        self._roots: dict[str, int] = {}  # row key -> state of the empty completion
        self._children: dict[tuple[int, int], int] = {}  # (state, token) -> state
        self._log_r: list[float] = []  # of each state, nan where it was not judged

    def __len__(self) -> int:
        return len(self._log_r)

    def __repr__(self) -> str:
        return repr(self.target)

    def to_spec(self) -> list[dict[str, Any]]:
        return self.target.to_spec()

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts if self.every_prefix else scoring.rollouts.final_only()
        if len(self) > MAX_STATES:
            self.clear()
        states = self._states(rollouts)
        missing = self._log_rewards(states, rollouts).isnan() & rollouts.stop_mask
        index = missing.any(1).nonzero().squeeze(1)
        if len(index) > 0:
            asked = rollouts.select(index)
            asked = replace(asked, stop_mask=missing[index, : asked.stop_mask.shape[1]])
            found, asking = self.target.score(asked)[asked.stop_mask].tolist(), index.tolist()
            for (b, t), log_r in zip(asked.stop_mask.nonzero().tolist(), found, strict=True):
                self._log_r[states[asking[b]][t]] = log_r
        return self._log_rewards(states, rollouts).nan_to_num(0.0, math.inf, -math.inf)

    def _states(self, rollouts: Rollouts) -> list[list[int]]:
        """The states of each trajectory, the empty completion first."""
        keys = [row_key(row) for row in rollouts.rows]
        out = []
        for row, tokens in zip(rollouts.row_index.tolist(), rollouts.completions(), strict=True):
            path = [self._number(self._roots, keys[row])]
            for token in tokens:
                path.append(self._number(self._children, (path[-1], token)))
            out.append(path)
        return out

    def _number(self, known: dict[Any, int], key: Any) -> int:
        if key not in known:
            known[key] = len(self._log_r)
            self._log_r.append(math.nan)
        return known[key]

    def _log_rewards(self, states: list[list[int]], rollouts: Rollouts) -> Tensor:
        """[B, T+1], nan where not judged."""
        width = rollouts.stop_mask.shape[1]
        lines = [[self._log_r[s] for s in path] + [math.nan] * (width - len(path)) for path in states]
        return torch.tensor(lines, device=rollouts.tokens.device)

    def save(self, folder: str | Path) -> None:
        """Write `memory.json` (row keys) and `memory.safetensors` into `folder`."""
        folder = Path(folder)
        steps = [(parent, token, child) for (parent, token), child in self._children.items()]
        tensors = {
            "steps": torch.tensor(steps, dtype=torch.int32).view(-1, 3),
            "log_reward": torch.tensor(self._log_r, dtype=torch.float32),
        }
        save_file(tensors, str(folder / "memory.safetensors"))
        (folder / "memory.json").write_text(json.dumps(self._roots))

    def load(self, folder: str | Path) -> None:
        """Replace the content by what `save` wrote. Raises CheckpointError if it is incomplete."""
        folder = Path(folder)
        try:
            roots = json.loads((folder / "memory.json").read_text())
            data = load_file(str(folder / "memory.safetensors"))
            children = {(parent, token): child for parent, token, child in data["steps"].tolist()}
            log_r = data["log_reward"].tolist()
            if len(roots) + len(children) != len(log_r):
                raise ValueError(f"{len(roots)} rows and {len(children)} steps, but {len(log_r)} rewards")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
            raise CheckpointError(
                f"{folder}: the rewards seen so far are incomplete ({type(e).__name__}: {e}); resume from an earlier "
                "checkpoint"
            ) from e
        self._roots, self._children, self._log_r = roots, children, log_r
