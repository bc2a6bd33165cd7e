"""Settings of earlier versions, and their replacements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from amortlm.errors import ConfigError
from amortlm.objectives import OBJECTIVES
from amortlm.settings import typed_value
from amortlm.train.behaviour import CORRECTED, REPLAY, TEMPERED

OF_OBJECTIVE = {
    "subtb_lambda": "lam",
    "subtb_states": "states",
    "log_z": "log_z",
    "log_z_learning_rate": "log_z_learning_rate",
}
RATIOS = {"corrected_ratio": 0.0, "replay_ratio": 0.25, "tempered_ratio": 0.5}  # with their former defaults


def refuse_renamed(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if a setting of earlier versions is given; the error names its replacement."""
    old = [name for name in given if name in OF_OBJECTIVE or name in RATIOS]
    instead = []
    if any(name in OF_OBJECTIVE for name in old):
        instead.append(f"objective={_objective(given)!r}")
    if any(name in RATIOS for name in old):
        instead.append(f"behaviour={_behaviour(given)!r}")
    if old:
        raise ConfigError(f"{', '.join(old)}: no longer a setting; write {' and '.join(instead)}")


def _objective(given: Mapping[str, Any]) -> str | dict[str, Any]:
    """The objective with the old settings that belong to it."""
    name = given.get("objective")
    if not isinstance(name, str) or name not in OBJECTIVES:
        name = "subtb"
    known = [f.name for f in fields(OBJECTIVES[name])]
    moved = {
        new: given[old] for old, new in OF_OBJECTIVE.items() if given.get(old) is not None and new in known
    }
    return {name: moved} if moved else name


def _behaviour(given: Mapping[str, Any]) -> dict[str, float]:
    """The old ratios were conditional chances, one after the other; the new shares are shares of all prompts."""
    corrected, replay, tempered = (typed_value(given.get(n, d), float, n) for n, d in RATIOS.items())
    mix = {
        CORRECTED: corrected,
        REPLAY: (1 - corrected) * replay,
        TEMPERED: (1 - corrected) * (1 - replay) * tempered,
    }
    return {name: round(share, 6) for name, share in mix.items() if share} or {"policy": 1.0}


def refuse_keywords(given: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
    """Raise ConfigError if a keyword of earlier versions is given. renamed: old name -> new name."""
    for name in given.keys() & renamed.keys():
        raise ConfigError(f"{name} is now called {renamed[name]}: write {renamed[name]}=")
