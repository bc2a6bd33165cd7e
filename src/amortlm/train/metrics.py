"""Figures of the updates between two logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from amortlm.train.processes import Processes

HIGHEST = "_max"  # figures whose names end so are logged by their maximum, all others by their mean


class Metrics:
    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def take(self, processes: Processes) -> dict[str, float]:
        """The mean (or maximum) of each figure over the updates since the last call, of all processes."""
        everyone = processes.gather({name: _one(name, values) for name, values in self._values.items()})
        self._values.clear()
        names = dict.fromkeys(name for own in everyone for name in own)
        return {name: _one(name, [own[name] for own in everyone if name in own]) for name in names}


def _one(name: str, values: list[float]) -> float:
    return max(values) if name.endswith(HIGHEST) else sum(values) / len(values)
