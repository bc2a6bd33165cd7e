"""The policy q: a trainable copy of the model, its support, and how it samples."""

from amortlm.policy.policy import Policy, default_lora
from amortlm.policy.sampling import Exploration
from amortlm.policy.support import BoundSupport, Support

__all__ = ["BoundSupport", "Exploration", "Policy", "Support", "default_lora"]
