"""Training: settings, where trajectories come from, and the trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amortlm.train.config import GFNConfig
    from amortlm.train.trainer import GFNTrainer

__all__ = ["GFNConfig", "GFNTrainer"]


def __getattr__(name: str) -> Any:
    """Imported on first use: the files of a run can be read (`amortlm.train.spec`) without torch."""
    homes = {"GFNConfig": "config", "GFNTrainer": "trainer"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
