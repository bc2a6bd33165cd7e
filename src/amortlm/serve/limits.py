"""What one request, and all of them together, may ask of a service."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from amortlm.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError for a limit that is not positive.

    n        completions of a request
    draws    completions that a correction, an estimate or a diagnosis may draw, and a diagnosis may enumerate
    body     bytes of a request's body
    waiting  requests that wait for the model; more are refused (429)
    seconds  from the arrival of a request to its answer (504)
    """

    n: int = 128
    draws: int = 4096
    body: int = 2**20
    waiting: int = 128
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (0 < value < math.inf):
                raise ConfigError(f"the limit {name!r} must be a positive number, not {value}")
