"""Seeds that are the same on every machine and in every process."""

from __future__ import annotations

import hashlib


def seed_of(key: object) -> int:
    """A seed from any printable value."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
