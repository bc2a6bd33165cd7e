"""The policy q: a trainable copy of the model on a support."""

from amortlm.policy.policy import Policy

__all__ = ["Policy"]
