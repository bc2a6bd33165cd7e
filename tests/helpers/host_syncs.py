"""What would make the host wait for a GPU, found on a CPU by the operations that are called.

On a GPU an operation is queued, and the host goes on; it waits where a number or a shape depends on values (`.item()`,
`.unique()`, an index of truth values), and a tensor that is made of Python numbers is copied there.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import amortlm

WAITS = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select", "lift_fresh", "is_nonzero")
PLACE = str(amortlm.__path__[0])


class HostSyncs(TorchDispatchMode):
    """found: how often which operation was called from which file of the library (the innermost), while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._lists = _Lists(self)

    def note(self, what: str) -> None:
        files = [f for f in traceback.extract_stack() if f.filename.startswith(PLACE)]
        # `law.to` and the like are followed to the line that calls it.
        place = f"{files[-1].filename[len(PLACE) + 1 :]}:{files[-1].name}" if files else "?"
        self.found[f"{what} in {place}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITS or (name in ("index", "index_put_") and _by_truth(args[1])):
            self.note(name)
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)


class _Lists(TorchFunctionMode):
    """Copies to lists are no operations on a CPU."""

    def __init__(self, noted: HostSyncs):
        super().__init__()
        self._noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self._noted.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _by_truth(indices: Any) -> bool:
    return any(x is not None and x.dtype == torch.bool for x in indices)
