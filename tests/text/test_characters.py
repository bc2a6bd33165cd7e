"""Kinds of characters, and UTF-8 read byte by byte, against Python's own decoder."""

from __future__ import annotations

import random
import re

import pytest

from amortlm.text.characters import NONE, REPLACEMENT, Kinds, Utf8
from amortlm.text.positions import Positions

PATTERNS = [r"(?s:.*\W)?(?i:sk)(?s:\W.*)?", r"[^\da-fé“]+", "(?a:\\w)", "."]
ODD = [
    0xE0,
    0xED,
    0xEF,
    0xF0,
    0xF4,
    0xF5,
    0xE2,
    0xC1,
    0xC3,
    0x80,
    0x8F,
    0x90,
    0x9F,
    0xA0,
    0xBF,
    0x41,
]  # at the limits


def test_characters_of_a_kind_are_read_alike() -> None:
    patterns = [Positions(p) for p in PATTERNS]
    kinds = Kinds.of_patterns(patterns)
    rng = random.Random(0)
    characters = sorted(
        {*map(chr, range(0x3000)), *(chr(rng.randrange(0x110000)) for _ in range(3_000)), "\u212a", "ſ"}
    )
    for i, pattern in enumerate(patterns):
        for c, readers in zip(characters, pattern.readers("".join(characters)), strict=True):
            assert kinds.readers[kinds.of[ord(c)]][i] == readers, (pattern.pattern, c)
    assert all(kinds.space[kinds.of[ord(c)]] == c.isspace() for c in characters)
    assert 8 < len(kinds.space) < 30


def kinds_read(utf8: Utf8, kinds: Kinds, text: bytes) -> list[int]:
    state, found = 0, []
    for byte in text:
        found += [int(k) for k in (utf8.first[state, byte], utf8.second[state, byte]) if k != NONE]
        state = int(utf8.after[state, byte])
    return [*found, int(kinds.of[ord(REPLACEMENT)])] if state else found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_are_read_as_python_decodes_them(pattern: str) -> None:
    kinds = Kinds.of_patterns([Positions(pattern)])
    utf8, rng = Utf8.of_kinds(kinds.of), random.Random(0)
    assert len(utf8.after) < 600
    broken = 0
    for _ in range(8_000):
        typed = "".join(
            chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(2)
        )
        odd = bytes(rng.choice([rng.choice(ODD), rng.randrange(256)]) for _ in range(rng.randint(0, 6)))
        text = typed.encode()[: rng.randint(0, 8)] + odd
        expected = text.decode(errors="replace")
        broken += REPLACEMENT in expected
        assert kinds_read(utf8, kinds, text) == [int(kinds.of[ord(c)]) for c in expected], text
    assert 2_000 < broken < 7_900


def test_every_code_point_is_read() -> None:
    kinds = Kinds.of_patterns([Positions(r"[\u0100-\u0180]|\U0001f600|[^\W\d]")])
    utf8, found = Utf8.of_kinds(kinds.of), []
    every = [c for c in range(0, 0x110000, 7) if not 0xD800 <= c < 0xE000]
    for code in every:
        found += kinds_read(utf8, kinds, chr(code).encode())
    assert found == kinds.of[every].tolist()
    assert re.fullmatch(r"[^\W\d]", "é")
    assert kinds.readers[kinds.of[ord("é")]] != kinds.readers[kinds.of[ord("1")]]
