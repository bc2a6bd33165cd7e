"""The rows of updates to come, so that their completions can be drawn ahead."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import DataLoader

from amortlm.types import Row


class Upcoming:
    """The micro-batches that `transformers.Trainer` will make of the rows, known before it makes them.

    Only what the loader takes batches from is iterated, never the loader: accelerate keeps account of those.
    """

    def __init__(self, loader: DataLoader[Row], rows: Sequence[Row], accumulation: int):
        """loader: like the one that training uses, prepared by accelerate, and not the same. accumulation:
        micro-batches of an update."""
        self._loader, self._rows, self._accumulation = loader, rows, accumulation
        self._updates = max(1, -(-len(loader) // accumulation))  # of an epoch; the last one may be short
        self._epoch = -1
        self._batches: list[list[int]] = []  # of this epoch

    def update(self, number: int) -> list[list[Row]]:
        """The micro-batches of an update, counted from the beginning of training."""
        epoch, place = divmod(number, self._updates)
        if epoch != self._epoch:
            self._loader.set_epoch(epoch)  # type: ignore[attr-defined]
            self._epoch, self._batches = epoch, list(self._loader.batch_sampler)  # type: ignore[arg-type]
        start = place * self._accumulation
        return [[self._rows[i] for i in batch] for batch in self._batches[start : start + self._accumulation]]
