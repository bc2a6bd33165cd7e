"""Replay buffer: per prompt, the best completions found so far, without near-duplicates."""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from amortlm.engine.prefix import pad_right
from amortlm.errors import CheckpointError
from amortlm.files import save_tensors
from amortlm.types import Rollouts, row_key

NEAR = 0.25  # Hu et al. 2024: near-duplicates have an edit distance below 25 % of their summed lengths
# Tokens. In shorter completions one edit makes another answer (" 100", " 101": four tokens where each digit is one), so
# only equal ones are near-duplicates.
SHORT = 5


@dataclass(frozen=True, order=True)
class Entry:
    """A completion (tokens without stop), its stop symbol and its final log reward, in nats."""

    log_reward: float
    tokens: tuple[int, ...]
    stop: int

    @cached_property
    def text(self) -> str:
        """Token ids as code points: rapidfuzz compares strings in C."""
        return "".join(map(chr, self.tokens))


def near_duplicates(entry: Entry, stored: Sequence[Entry]) -> list[Entry]:
    """The entries of `stored` that are near-duplicates of `entry`. All edit distances are computed in one batch."""
    n = len(entry.tokens)
    if n < SHORT:
        return [e for e in stored if e.tokens == entry.tokens]
    distances = cdist([entry.text], [e.text for e in stored], scorer=Levenshtein.distance)[0].tolist()
    return [
        e
        for e, distance in zip(stored, distances, strict=True)
        if distance == 0 or (len(e.tokens) >= SHORT and distance < NEAR * (n + len(e.tokens)))
    ]


class ReplayBuffer:
    """At most `capacity` completions per prompt, worst first. Of two near-duplicates only the better one is kept."""

    def __init__(self, capacity: int = 50, prioritized: bool = True):
        self.capacity, self.prioritized = capacity, prioritized
        self._entries: dict[str, list[Entry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def entries(self, key: str) -> Sequence[Entry]:
        """The completions stored under a row key, worst first."""
        return self._entries.get(key, [])

    def add(self, rollouts: Rollouts, log_reward: Tensor) -> None:
        """Offer every trajectory to the buffer. log_reward [B]: final log reward, nats; -inf is never stored."""
        keys = [row_key(row) for row in rollouts.rows]
        offered = zip(
            rollouts.row_index.tolist(),
            rollouts.completions(),
            rollouts.stops.tolist(),
            log_reward.tolist(),
            strict=True,
        )
        for row, tokens, stop, reward in offered:
            if reward > float("-inf"):
                self._offer(keys[row], Entry(reward, tuple(tokens), stop))

    def _offer(self, key: str, entry: Entry) -> None:
        if self.capacity < 1:
            return
        stored = self._entries.setdefault(key, [])
        if len(stored) >= self.capacity and entry.log_reward <= stored[0].log_reward:
            return
        near = near_duplicates(entry, stored)
        if any(e.log_reward >= entry.log_reward for e in near):
            return
        for e in near:
            stored.remove(e)
        insort(stored, entry)
        del stored[: -self.capacity]

    def draw(self, key: str, count: int, generator: torch.Generator) -> list[Entry]:
        """Up to `count` different completions, drawn in proportion to reward (prioritized) or uniformly."""
        stored = self.entries(key)
        if not stored:
            return []
        log_reward = torch.tensor([e.log_reward for e in stored], dtype=torch.float64)
        log_weight = log_reward if self.prioritized else torch.zeros_like(log_reward)
        # Gumbel top-k: sampling without replacement from softmax(log_weight).
        uniform = torch.rand(len(stored), generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp_min(1e-300).log()).log()
        best = (log_weight + gumbel).topk(min(count, len(stored))).indices
        return [stored[i] for i in best.tolist()]

    def save(self, folder: str | Path) -> None:
        """Write `buffer.json` (keys and counts) and `buffer.safetensors` into `folder`."""
        folder = Path(folder)
        flat = [e for stored in self._entries.values() for e in stored]
        tokens, lengths = pad_right([e.tokens for e in flat], "cpu")
        save_tensors(
            {
                "tokens": tokens,
                "lengths": lengths.long(),
                "stops": torch.tensor([e.stop for e in flat], dtype=torch.long),
                "log_reward": torch.tensor([e.log_reward for e in flat], dtype=torch.float64),
            },
            folder / "buffer.safetensors",
        )
        counts = {key: len(stored) for key, stored in self._entries.items()}
        (folder / "buffer.json").write_text(json.dumps(counts), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Replace the content by what `save` wrote. Raises CheckpointError if it is incomplete."""
        folder = Path(folder)
        try:
            counts = json.loads((folder / "buffer.json").read_text(encoding="utf-8"))
            data = load_file(str(folder / "buffer.safetensors"))
            flat = iter(_entries(data))
            entries = {key: [next(flat) for _ in range(n)] for key, n in counts.items()}
            if next(flat, None) is not None:
                raise ValueError("buffer.json counts fewer completions than buffer.safetensors holds")
        except (OSError, ValueError, KeyError, StopIteration, RuntimeError, SafetensorError) as e:
            raise CheckpointError(
                f"{folder}: the replay buffer is incomplete ({type(e).__name__}: {e}); resume from an earlier "
                "checkpoint"
            ) from e
        self._entries = entries


def _entries(data: dict[str, Tensor]) -> Iterable[Entry]:
    columns = zip(
        data["tokens"].tolist(),
        data["lengths"].tolist(),
        data["stops"].tolist(),
        data["log_reward"].tolist(),
        strict=True,
    )
    for tokens, length, stop, log_reward in columns:
        yield Entry(log_reward, tuple(tokens[:length]), stop)
