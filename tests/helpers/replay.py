"""A CUDA graph on a CPU: the operations of a step are recorded once, and replayed into the same memory.

As in a graph, what Python does between operations happens once: an attribute that is assigned anew, a number that is
counted in Python, or a branch that depends on values shows in what is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            marks = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
            if marks and not any(mark.is_write for mark in marks):
                continue  # a view of memory that stays where it is
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """In the place of `amortlm.engine.static._captured`. Recording runs the step, so the first call does nothing."""
    recorded = Recorded()
    with recorded:
        step()
    ran = [True]

    def replay() -> None:
        if ran:
            ran.clear()
        else:
            recorded.replay()

    return replay
