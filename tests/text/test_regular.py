"""Regular expressions that pass `check_pattern` are read alike by Python, by `matches` and by a support's pattern."""

from __future__ import annotations

import random
import re

import pytest

from amortlm.errors import ConfigError
from amortlm.text.positions import Positions
from amortlm.text.regular import check_pattern

REFUSED = {
    "[[:alpha:]]+": "[a-zA-Z] for letters",
    "[a[b]": "in a class",
    "[a-z&&b]": "in a class",
    "[a-z--b]": "in a class",
    "[a-z~~b]": "in a class",
    "[a||b]": "in a class",
    "a++": "one repetition",
    "a{2}+a": "one repetition",
    "(?:foo){e}": r"write \{",
    "x{,3}": r"write \{",
    r"\<a": "without a backslash",
    "((a{1000}){1000}){1000}": "more than 100,000 characters",
    "a{1000000000}": "more than 100,000 characters",
    "(": "missing )",
    "(" * 5000 + ")" * 5000: "recursion",
}


@pytest.mark.parametrize(("pattern", "what"), REFUSED.items(), ids=[p[:12] for p in REFUSED])
def test_what_is_read_in_two_ways_is_refused(pattern, what):
    with pytest.raises(ConfigError, match=re.escape(what)):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", [5, None, b"a", ["a"]])
def test_a_pattern_is_text(pattern):
    with pytest.raises(ConfigError, match="is text"):
        check_pattern(pattern)


PLAIN = [
    "",
    r"\*+",
    "[*+]+",
    r"[\]{]",
    r"\\<a",
    "a}+",
    r"\{x\}",
    "[]a]",
    "[^]a]",
    r"\N{DIGIT ONE}",
    r"\d{4}-\d{2}",
    r"(.* )?(dog( .*)? park|park( .*)? dog)( .*)?",
]


@pytest.mark.parametrize("pattern", PLAIN)
def test_plain_patterns_pass(pattern):
    check_pattern(pattern)


PIECES = [
    *"ab{}[]()*+?|.-&~^<: ",
    "[a-b]",
    "[^a]",
    r"\w",
    r"\s",
    r"\<",
    r"\{",
    "{2}",
    "{0,2}",
    "&&",
    "--",
    "[:alpha:]",
]
TEXTS = ["", *"ab{}[]+<-& ", "aa", "ab", "aba", "aab", "a{", "{}", "<a", "a b", "a-b", "a&", "aaaa"]


def readings(pattern):
    """What the engines make of a pattern: the texts that match."""
    import regex

    try:
        positions = Positions(pattern)
    except ConfigError:  # not regular
        return None
    theirs = [text for text in TEXTS if positions.matches(text)]
    python = [t for t in TEXTS if re.fullmatch(pattern, t)]
    return python, [t for t in TEXTS if regex.fullmatch(pattern, t)], theirs


def test_whatever_passes_is_read_alike():
    rng, compared = random.Random(0), 0
    for _ in range(1000):
        pattern = "".join(rng.choices(PIECES, k=rng.randint(1, 7)))
        try:
            check_pattern(pattern)
        except ConfigError:
            continue
        found = readings(pattern)
        if found is not None:
            compared += 1
            assert found[0] == found[1] == found[2], pattern
    assert compared > 150
