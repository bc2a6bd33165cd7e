"""Checks of users' regular expressions, the same in a target (`constraint.matches`) and in a support (`pattern`)."""

from __future__ import annotations

import re
import warnings

from amortlm.errors import ConfigError

LONGEST = 100_000  # limit on the characters that counts require: engines write counts out
ESCAPED = re.compile(r"\\N\{[^}]*\}|\\.", re.DOTALL)
CLASS = re.compile(r"\[\^?\]?([^\]]*)\]")
# Text that is syntax for one library and plain text for another, and what to write instead.
INSIDE_CLASS = (
    r"\[|&&|--|~~|\|\|",
    r"in a class write \[ \& \- \~ \| for the signs themselves, [a-zA-Z] for letters",
)
OUTSIDE = (
    (
        r"\{(?!\d+(,\d*)?\})",
        r"a brace begins a count such as {3}, {0,3} or {3,}; write \{ for the sign itself",
    ),
    (
        r"([*+?]|\{\d+(,\d*)?\})\+",
        "a + after a repetition (a++) is possessive only in Python; write one repetition",
    ),
)


def check_pattern(pattern: str) -> None:
    """Raise ConfigError unless `pattern` is a regular expression of Python that all engines used here read in the same
    way.

    Refused are nested classes and set operators (`[[:alpha:]]`, `[a-z&&b]`), possessive repetition (`a++`), a brace
    that begins no count (`{e}`), `\\<` and `\\>`, and counts that require more than LONGEST characters.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"a regular expression is text, got {pattern!r}; write it in quotes")
    what = f"regular expression {pattern if len(pattern) <= 80 else pattern[:77] + '...'!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about syntax that is refused below
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ConfigError(f"{what}: {e}") from None
    if re.search(r"\\[<>]", pattern.replace("\\\\", "")):
        raise ConfigError(f"{what}: write < and > without a backslash")
    plain = ESCAPED.sub("x", pattern)
    outside = CLASS.sub("x", plain)
    odd = [INSIDE_CLASS[1] for inside in CLASS.findall(plain) if re.search(INSIDE_CLASS[0], inside)]
    odd += [remedy for sign, remedy in OUTSIDE if re.search(sign, outside)]
    if odd:
        raise ConfigError(f"{what} is read differently by different libraries: {odd[0]}")
    if _asked(outside) > LONGEST:
        raise ConfigError(f"{what}: its counts require more than {LONGEST:,} characters; lower them")


def _asked(plain: str) -> int:
    """An upper bound on the characters that the counts require, of a pattern without escapes and classes."""
    groups, last = [0], 0
    for part in re.finditer(r"\{(\d+)[^}]*\}|.", plain, re.DOTALL):
        if part[0] == "(":
            groups.append(0)
        elif part[0] == ")":
            last = groups.pop()
            groups[-1] += last
        elif part[1]:
            groups[-1] += last * (int(part[1]) - 1)
            last *= int(part[1])
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
