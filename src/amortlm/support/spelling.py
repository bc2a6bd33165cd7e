"""What each token of a vocabulary writes: a text, or bytes that are a part of a character."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor

from amortlm.errors import SupportError
from amortlm.text.characters import REPLACEMENT

if TYPE_CHECKING:
    from amortlm.text.codec import Codec


class UnsuitableError(SupportError):
    """A support whose tables cannot be made for this tokenizer, or are too large."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclass(frozen=True)
class Spelling:
    """Tokens whose texts join to the text of a completion.

    texts    token id -> its text
    parts    token id -> its bytes, which are no text alone: they join in UTF-8 with those of other tokens
    unknown  tokens of which neither is known
    """

    texts: dict[int, str]
    parts: dict[int, bytes]
    unknown: frozenset[int]


def spelling(lm: Codec, allowed: Tensor) -> Spelling:
    """What the tokens of `allowed` [V] write. Raises UnsuitableError if texts of tokens do not join."""
    every = allowed.nonzero().squeeze(1).tolist()
    texts = {token: lm.decode([token]) for token in every}
    broken = {token: _bytes(lm, token, text) for token, text in texts.items() if REPLACEMENT in text}
    texts = {token: text for token, text in texts.items() if text and REPLACEMENT not in text}
    parts = {token: found for token, found in broken.items() if found}
    # Test each token beside other tokens, and each ASCII character after each other: "clean-up" writes " ." as ".".
    first, last = ({x[i]: token for token, x in texts.items() if x[i].isascii()} for i in (0, -1))
    ends = (z for pair in product(last.values(), first.values()) for z in pair)
    if not _joins(lm, [*texts, *reversed(texts), *ends], texts, {}):
        raise UnsuitableError(
            f"{lm.name}: in its tokenizer the text of a token depends on the tokens beside it, so a pattern cannot be "
            "read token by token",
            "put constraint.matches(pattern) into the target",
        )
    # Parts of characters among themselves and texts: some tokenizers replace a whole run of bytes at an error.
    rng, pool = random.Random(0), [*parts, *parts, *list(texts)[: len(parts)]]
    if not _joins(
        lm, [*parts, *reversed(parts), *rng.choices(pool, k=8 * len(pool) if pool else 0)], texts, parts
    ):
        parts = {}
    return Spelling(texts, parts, frozenset(every) - texts.keys() - parts.keys())


def _joins(lm: Codec, tokens: Sequence[int], texts: dict[int, str], parts: dict[int, bytes]) -> bool:
    """Is the text of these tokens that of their joined bytes?"""
    joined = b"".join(parts[t] if t in parts else texts[t].encode() for t in tokens)
    return lm.decode(tokens) == joined.decode(errors="replace")


def _bytes(lm: Codec, token: int, text: str) -> bytes | None:
    """The bytes of a token of a byte-level tokenizer, which writes each byte as a character of its own."""
    piece = lm.tokenizer.convert_ids_to_tokens(token)
    of = _byte_of()
    if not isinstance(piece, str) or not all(c in of for c in piece):
        return None
    found = bytes(of[c] for c in piece)
    return found if found.decode(errors="replace") == text else None


@cache
def _byte_of() -> dict[str, int]:
    """The byte that a character of a byte-level vocabulary stands for (GPT-2): printable ones stand for themselves, the
    others, in order, are the characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
