"""Settings that the user leaves open are chosen from the rows and the target."""

from __future__ import annotations

import copy
from typing import Any

from amortlm.targets.base import Target
from amortlm.train.config import AUTO, GFNConfig

UPDATE = 64  # completions in an update
LEAST = 8  # completions of a prompt
STATES = 4  # stopping states of a completion that are scored where each takes passes of its own


def settled(config: GFNConfig, rows: int, target: Target) -> tuple[GFNConfig, list[str]]:
    """(the settings without open ones, a sentence on each choice, for the log). rows: how many train.

    Why these choices: docs/training.md. Raises ConfigError where they do not fit the other settings.
    """
    if config.objective != AUTO and config.num_samples:
        return config, []
    config, said = copy.copy(config), []
    if config.objective == AUTO:
        name, reason = objective_for(target)
        config.objective = name
        said.append(f"objective={name!r}: {reason}")
    if not config.num_samples:
        prompts = min(rows, config.per_device_train_batch_size)
        config.num_samples = max(LEAST, UPDATE // prompts)
        said.append(f"num_samples={config.num_samples}: an update has {prompts} of {rows} prompts")
    config.check_objective()
    return config, said


def objective_for(target: Target) -> tuple[str | dict[str, Any], str]:
    """(objective, reason). SubTB learns from every prefix, and VarGrad from finished completions alone."""
    if not target.every_prefix:
        return "vargrad", "the target judges finished completions only"
    if target.has_suffix:
        return {"subtb": {"states": STATES}}, "text follows {z}, so that every state takes passes of its own"
    return "subtb", "every prefix is scored in the same pass"
