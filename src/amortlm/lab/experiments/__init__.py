"""The paper's five experiments, and `dice`, as commands: `amortlm reproduce NAME`. Nothing heavy is imported before one
runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from amortlm.errors import ConfigError, nearest

if TYPE_CHECKING:
    from amortlm.lab.experiment import Experiment

EXPERIMENTS = ("numbers", "continuation", "infilling", "subjectivity", "arithmetic", "dice")
PRESETS = ("smoke", "small", "real", "paper")


def load_experiment(name: str) -> Experiment:
    """An experiment by name. Raises ConfigError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return importlib.import_module(f"amortlm.lab.experiments.{name}").EXPERIMENT
