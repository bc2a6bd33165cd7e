"""Packages of the extra `[baselines]`, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from amortlm.errors import MissingExtraError


def extra(module: str, needed_for: str, otherwise: str = "") -> Any:
    """The module. Raises MissingExtraError where it is not installed; otherwise: what to do without it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split(".")[0]
        raise MissingExtraError(
            f"{needed_for} needs {package}: pip install 'amortlm[baselines]'{otherwise}"
        ) from e
