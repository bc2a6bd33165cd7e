"""The model card of a saved posterior."""

from amortlm.card.card import (
    CHECK,
    DRAWS,
    FILE,
    MARK,
    PLACE,
    ROWS,
    SAMPLES,
    Base,
    Card,
    Drawn,
    base_of,
    read,
    write,
)

__all__ = [
    "CHECK",
    "DRAWS",
    "FILE",
    "MARK",
    "PLACE",
    "ROWS",
    "SAMPLES",
    "Base",
    "Card",
    "Drawn",
    "base_of",
    "read",
    "write",
]
