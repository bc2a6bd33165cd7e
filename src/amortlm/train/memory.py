"""A cache of the target's rewards of prefixes."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from amortlm.files import save_tensors
from amortlm.targets.base import Scoring, Target
from amortlm.types import Rollouts, row_key

logger = logging.getLogger(__name__)
MAX_PREFIXES = 2**20  # about 200 MB


class RewardMemory(Target):
    """`target` with a cache: each (row, prefix) is scored once, because a reward does not change while q is trained.

    A policy with low entropy often writes the same prefixes for a prompt. Prefixes are numbered, and the number of
    (prefix, token) is looked up, so that each token costs one look-up. Beyond `MAX_PREFIXES` the cache is cleared.
    """

    def __init__(self, target: Target):
        self.target = target
        self.every_prefix, self.columns = target.every_prefix, target.columns
        self.clear()

    def clear(self) -> None:
        self._roots: dict[str, int] = {}  # row key -> number of the empty completion
        self._children: dict[tuple[int, int], int] = {}  # (prefix, token) -> prefix
        self._log_r: list[float] = []  # of each prefix; NaN if it was not scored

    def __len__(self) -> int:
        return len(self._log_r)

    def __repr__(self) -> str:
        return repr(self.target)

    def to_spec(self) -> list[dict[str, Any]]:
        return self.target.to_spec()

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts if self.every_prefix else scoring.rollouts.final_only()
        if len(self) > MAX_PREFIXES:
            self.clear()
        prefixes = self._prefixes(rollouts)
        first = self._unknown(prefixes, rollouts.stop_mask)
        if first:
            rows = sorted({b for b, _ in first.values()})
            asked = rollouts.select(torch.tensor(rows, device=rollouts.tokens.device))
            mask = torch.zeros(rollouts.stop_mask.shape, dtype=torch.bool)
            mask[tuple(zip(*first.values(), strict=True))] = True
            mask = mask[rows, : asked.stop_mask.shape[1]]
            found = self.target.score(replace(asked, stop_mask=mask.to(asked.stop_mask.device))).cpu()
            for (b, t), log_r in zip(mask.nonzero().tolist(), found[mask].tolist(), strict=True):
                self._log_r[prefixes[rows[b]][t]] = log_r
        return self._log_rewards(prefixes, rollouts)

    def _unknown(self, prefixes: list[list[int]], stop_mask: Tensor) -> dict[int, tuple[int, int]]:
        """The prefixes without a reward, each with the first (trajectory, length) at which it occurs."""
        found: dict[int, tuple[int, int]] = {}
        for b, t in stop_mask.nonzero().tolist():
            if math.isnan(self._log_r[prefixes[b][t]]):
                found.setdefault(prefixes[b][t], (b, t))
        return found

    def _prefixes(self, rollouts: Rollouts) -> list[list[int]]:
        """The prefixes of each trajectory, the empty completion first."""
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

    def _log_rewards(self, prefixes: list[list[int]], rollouts: Rollouts) -> Tensor:
        """[B, T+1] log R, nats, 0 at states that were not scored."""
        width = rollouts.stop_mask.shape[1]
        lines = [[self._log_r[n] for n in path] + [0.0] * (width - len(path)) for path in prefixes]
        return torch.tensor(lines, device=rollouts.tokens.device).nan_to_num(0.0, math.inf, -math.inf)

    def save(self, folder: str | Path) -> None:
        """Write `memory.json` (target, row keys) and `memory.safetensors` into `folder`."""
        folder = Path(folder)
        steps = [(parent, token, child) for (parent, token), child in self._children.items()]
        tensors = {
            "steps": torch.tensor(steps, dtype=torch.int32).view(-1, 3),
            "log_reward": torch.tensor(self._log_r, dtype=torch.float32),
        }
        save_tensors(tensors, folder / "memory.safetensors")
        about = json.dumps({"target": repr(self), "roots": self._roots})
        (folder / "memory.json").write_text(about, encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Replace the content by what `save` wrote for the same target. If the files cannot be used, the cache stays
        empty, with a warning: the rewards are then computed again."""
        self.clear()
        try:
            self._load(Path(folder))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
            logger.warning("%s: rewards are computed again (%s: %s)", folder, type(e).__name__, e)

    def _load(self, folder: Path) -> None:
        about = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
        data = load_file(str(folder / "memory.safetensors"))
        if about["target"] != repr(self):
            raise ValueError(f"the saved rewards are of {about['target']}, not of {self!r}")
        roots, log_r = about["roots"], data["log_reward"].tolist()
        children = {(parent, token): child for parent, token, child in data["steps"].tolist()}
        if len(roots) + len(children) != len(log_r):
            raise ValueError(f"{len(roots)} rows and {len(children)} steps, but {len(log_r)} rewards")
        self._roots, self._children, self._log_r = roots, children, log_r
