"""Every error amortlm raises on purpose.

AmortLMError
├── DataError            rows are empty, a column is missing, a completion is outside the support
├── TemplateError        unknown placeholder, `{z}` missing or repeated, bad braces
├── PromptTooLongError   prompt + completion do not fit the model's context
├── ModelError           the log-probabilities of a model cannot be computed exactly
├── SupportError         a stop string is not one token, a support allows nothing
├── RewardError          a reward is NaN or +inf, a target does not fit an objective
├── ConfigError          unknown task, YAML key or objective (with the nearest valid name), wrong settings
├── TrainingError        a loss is not finite, a process of the run has stopped
├── CheckpointError      a saved run or posterior is incomplete, damaged, of another format or of another run
├── RolloutError         a server that draws completions fails, or draws from other weights
├── HubError             the hub cannot be reached, refuses access, or has no such repository
└── MissingExtraError    an optional dependency is not installed
"""

from __future__ import annotations

from collections.abc import Iterable


class AmortLMError(Exception):
    """Base class: catch this to catch everything amortlm raises on purpose."""


class DataError(AmortLMError, ValueError):
    pass


class TemplateError(AmortLMError, ValueError):
    pass


class PromptTooLongError(AmortLMError, ValueError):
    pass


class ModelError(AmortLMError, ValueError):
    pass


class SupportError(AmortLMError, ValueError):
    pass


class RewardError(AmortLMError, ValueError):
    pass


class ConfigError(AmortLMError, ValueError):
    pass


class TrainingError(AmortLMError, RuntimeError):
    pass


class CheckpointError(AmortLMError, RuntimeError):
    pass


class RolloutError(AmortLMError, RuntimeError):
    pass


class HubError(AmortLMError, RuntimeError):
    pass


class MissingExtraError(AmortLMError, ImportError):
    pass


def nearest(name: str, valid: Iterable[str], label: str = "Valid") -> str:
    """A phrase that names the closest valid choice, for the end of an error message. label: what the choices are."""
    from difflib import get_close_matches

    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}{label}: {', '.join(valid)}."
