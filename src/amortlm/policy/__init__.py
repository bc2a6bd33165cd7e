"""The policy q: a trainable copy of the model, its support, and how it samples."""

from amortlm.policy.adapter import default_lora
from amortlm.policy.policy import Policy
from amortlm.policy.sampling import Exploration
from amortlm.policy.support import BoundSupport, Support
from amortlm.policy.tools import Calculator, Lookup, Tool

__all__ = ["BoundSupport", "Calculator", "Exploration", "Lookup", "Policy", "Support", "Tool", "default_lora"]
