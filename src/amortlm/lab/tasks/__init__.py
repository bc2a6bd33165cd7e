"""Tasks of the paper's experiments. Those in `TASKS` have a `SPEC`, which `amortlm train NAME` runs."""

from __future__ import annotations

import importlib

TASKS = ("infilling", "numbers")


def check_name(name: str) -> None:
    """Raise ConfigError for an unknown task."""
    from amortlm.errors import ConfigError, nearest

    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; {nearest(name, TASKS)} Or give a path that ends in .yaml")


def load_task(name: str):  # type: ignore[no-untyped-def]
    """The module of a built-in task. Raises ConfigError for an unknown name."""
    check_name(name)
    return importlib.import_module(f"amortlm.lab.tasks.{name}")
