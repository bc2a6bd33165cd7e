"""Targets: unnormalised log posteriors over completions, and their algebra."""

from amortlm.targets.base import Target
from amortlm.targets.lm import LogProb

__all__ = ["LogProb", "Target"]
