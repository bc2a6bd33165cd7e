"""Texts in Markdown. Those of rows, targets and samples are data of a user: they stand in code blocks whose fence is
longer than any in the text, or in table cells where every mark of Markdown and HTML is a character reference."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from amortlm.types import Row

LONGEST = 500  # characters of a value, and of a sample
SAFE = re.compile(r"[\w ,.'()?-]")


def as_yaml(value: Any, flow: bool | None = None) -> str:
    """flow: may mappings stand in braces? By default those without further ones."""
    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)


def shortened(row: Row) -> dict[str, Any]:
    return {k: _short(v) if isinstance(v, str) else v for k, v in row.items()}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [..]"


def fenced(text: str, language: str) -> str:
    """A code block with a fence that the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """A text in a table or sentence, where it is shown as it is: no Markdown, HTML, link or line break in it acts."""
    shown = "".join(_reference(c) for c in _short(text))
    return re.sub(r"www\.", lambda found: found[0].replace(".", "&#46;"), shown, flags=re.IGNORECASE)


def _reference(character: str) -> str:
    if character == "\n":
        return "↵"
    if not character.isprintable():
        return f"&#92;x{ord(character):02x}"
    return (
        character
        if character.isascii() and SAFE.match(character) and character != "_"
        else (f"&#{ord(character)};" if character.isascii() else character)
    )


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of lines with the same keys."""
    head = list(lines[0])
    rows = [head, ["---"] * len(head), *([line[name] for name in head] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
