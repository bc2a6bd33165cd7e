"""Several processes of one run (torchrun): they share work and wait for each other at the same places. If one is late
or has died, the others end with an error that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from amortlm.engine.shards import Shards
from amortlm.errors import AmortLMError, TrainingError
from amortlm.train.config import GFNConfig

T = TypeVar("T")
S = TypeVar("S")


class Processes:
    """The processes of a run, or the only one. All must enter every method, in the same order."""

    def __init__(self, args: GFNConfig):
        self.args = args
        self.count, self.index = args.world_size, args.process_index
        self.shards: Shards | None = None  # of sharded models
        self._group = self._rounds = None
        if self.count > 1:
            # A separate group, because NCCL has no barrier that names the missing process. Its timeout is for waiting
            # for process 0, which may itself be waiting for others.
            self._group = dist.new_group(backend="gloo", timeout=2 * args.ddp_timeout_delta)
            self._rounds = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def share(self, function: Callable[[T], S], items: Sequence[T]) -> list[S]:
        """[function(x) for x in items] in every process; each process computes its part."""
        own = {i: function(items[i]) for i in range(self.index, len(items), self.count)}
        done = {i: result for part in self.gather(own) for i, result in part.items()}
        return [done[i] for i in range(len(items))]

    def gather(self, value: T) -> list[T]:
        """The `value` of each process, in every process."""
        self.meet()
        return gather_object([value])

    def first(self, find: Callable[[], T]) -> T:
        """The result of `find` in the first process, for all processes; all raise its AmortLMError or OSError."""
        found: Any = None
        error: Exception | None = None
        if self.index == 0:
            try:
                found = find()
            except (AmortLMError, OSError) as e:
                error = e
        found, error = self.gather((found, error))[0]
        if error is not None:
            raise error
        return found

    def meet(self) -> None:
        """Wait for all processes, at most `ddp_timeout` seconds, and join in their passes of sharded models meanwhile.
        Raises TrainingError naming the missing processes."""
        if self.shards is not None:
            self.shards.serve()
        if self._group is not None:
            with self.blaming():
                dist.monitored_barrier(self._group, self.args.ddp_timeout_delta, wait_all_ranks=True)

    def agree(self, needs: Sequence[int]) -> list[int]:
        """Their sums over all processes. Raises TrainingError for a late process."""
        found = torch.tensor(needs)
        with self.blaming():
            dist.all_reduce(found, group=self._rounds)
        return found.tolist()

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Turns an error of communication between processes into a TrainingError of one sentence."""
        try:
            yield
        except RuntimeError as e:
            who = _missing(str(e))
            if self.count == 1 or who is None:
                raise
            raise TrainingError(
                f"process {self.index} of {self.count} ends: {who} stopped, or was more than ddp_timeout="
                f"{self.args.ddp_timeout} seconds late. The output of the others shows the reason (a slow verifier "
                "needs a longer ddp_timeout); checkpoints already saved are intact"
            ) from e


def _missing(message: str) -> str | None:
    """The process that an error of torch.distributed names; None if it is another error."""
    if found := re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", message):
        return f"process {found[1].strip()}"
    if "monitoredBarrier" in message:
        return "process 0"
    # Inside a collective operation, gloo and NCCL name no process.
    return "another process" if re.search(r"Connection (closed|reset)|[Tt]imed out|NCCL", message) else None
