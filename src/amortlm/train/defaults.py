"""Settings that the user leaves open are chosen from the rows, the target and the support."""

from __future__ import annotations

import copy
from typing import Any

from amortlm.support import SupportLaw
from amortlm.targets.base import Target
from amortlm.train.behaviour import DEFAULT, POLICY, PRIOR, REPLAY, TEMPERED, full_mix
from amortlm.train.config import AUTO, LOCAL, GFNConfig

UPDATE = 64  # completions in an update
LEAST = 8  # completions of a prompt
# In place of the default mix where the support has a pattern: the prior then finds what is rare (`train/source.py`).
LOOKING_AHEAD = {POLICY: 0.375, TEMPERED: 0.25, REPLAY: 0.25, PRIOR: 0.125}
STATES = 4  # stopping states of a completion that are scored where each takes passes of its own


def settled(config: GFNConfig, rows: int, target: Target, support: SupportLaw) -> tuple[GFNConfig, list[str]]:
    """(the settings without open ones, a sentence on each choice, for the log). rows: how many train.

    Why these choices: docs/training.md. Raises ConfigError where they do not fit the other settings.
    """
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
    if support.patterns and config.behaviour == DEFAULT and config.rollout == LOCAL:
        config.behaviour = full_mix(LOOKING_AHEAD)
        said.append(f"behaviour={LOOKING_AHEAD!r}: the prior looks ahead to what the support asks for")
    return config, said


def objective_for(target: Target) -> tuple[str | dict[str, Any], str]:
    """(objective, reason). SubTB learns from every prefix, and VarGrad from finished completions alone."""
    if not target.every_prefix:
        return "vargrad", "the target judges finished completions only"
    if target.has_suffix:
        return {"subtb": {"states": STATES}}, "text follows {z}, so that every state takes passes of its own"
    return "subtb", "every prefix is scored in the same pass"
