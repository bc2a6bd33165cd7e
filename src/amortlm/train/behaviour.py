"""The mix of behaviours: where the completions of each prompt come from while the policy is trained."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amortlm.errors import ConfigError
from amortlm.settings import check_keys, typed_value

POLICY, TEMPERED, REPLAY, CORRECTED, PRIOR = NAMES = ("policy", "tempered", "replay", "corrected", "prior")
DEFAULT = {POLICY: 0.375, TEMPERED: 0.375, REPLAY: 0.25, CORRECTED: 0.0, PRIOR: 0.0}
ROUNDING = 1e-6  # tolerance of the sum of the shares


def full_mix(given: Any) -> dict[str, float]:
    """All five shares. Shares that are left out are 0, except that `policy` takes the rest if it is left out. Raises
    ConfigError for other names, negative shares or a wrong sum."""
    check_keys(given, NAMES, "behaviour")
    shares = {name: typed_value(share, float, f"behaviour: {name}") for name, share in given.items()}
    total = sum(shares.values())
    short = POLICY in shares and total < 1 - ROUNDING
    if min(shares.values(), default=0) < 0 or total > 1 + ROUNDING or short:
        raise ConfigError(
            f"behaviour={given!r}: shares must be at least 0 and sum to one, and these sum to {total:g} (if policy is "
            "left out, it takes the rest)"
        )
    return {name: shares.get(name, max(0.0, 1.0 - total) if name == POLICY else 0.0) for name in NAMES}


def chances(mix: Mapping[str, float]) -> tuple[float, float, float, float]:
    """Conditional chances of (corrected, replay, tempered, prior): of corrected; of replay if it is not corrected; of
    each of the others if it is neither."""
    corrected, replay = mix[CORRECTED], mix[REPLAY]
    left = 1 - corrected - replay
    return corrected, _share(replay, 1 - corrected), _share(mix[TEMPERED], left), _share(mix[PRIOR], left)


@dataclass(frozen=True)
class Choice:
    """Where the completions of one prompt come from in one step.

    corrected    draws near the posterior
    replay       the seed of draws from the buffer; None: no replay
    temperature  of the policy's own completions, which fill up; None: the model before training fills up
    """

    corrected: bool
    replay: int | None
    temperature: float | None


def choose(
    mix: Mapping[str, float], temperatures: tuple[float, float], corrected: bool, chosen: random.Random
) -> Choice:
    """A behaviour, drawn from a mix for a prompt of which is known whether it is corrected."""
    _, replay_chance, tempered_chance, prior_chance = chances(mix)
    replayed = not corrected and chosen.random() < replay_chance
    replay = chosen.getrandbits(48) if replayed else None
    u = chosen.random()
    if u < tempered_chance:
        return Choice(corrected, replay, chosen.uniform(*temperatures))
    return Choice(corrected, replay, None if u < tempered_chance + prior_chance else 1.0)


def _share(part: float, of: float) -> float:
    return min(1.0, part / of) if of > 0 else 0.0
