"""Completions of q drawn by a server, for example vLLM (docs/scale.md)."""

from amortlm.rollout.sampler import HTTPSampler

__all__ = ["HTTPSampler"]
