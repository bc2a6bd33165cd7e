"""The docstrings of amortlm as Markdown, for the page docs/reference.md: an extension of griffe (zensical.toml).

Docstrings are written for the terminal: names in one column, their meaning in the next, shapes in brackets.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

COLUMNS = re.compile(r"(?P<name>\S.*?) {2,}(?P<text>\S.*)")  # of a class: its attributes
ARGUMENT = re.compile(r"(?P<name>[a-z_]+(?:, [a-z_]+)*(?: \[\w+\])?): (?P<text>.*)")  # of a function
CODE = re.compile(r"(`[^`]+`)")


def to_markdown(text: str) -> str:
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text.strip("\n"))))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if any(line.startswith(("├", "└")) for line in lines):  # a tree
        return "```text\n" + text + "\n```"
    if all(line.startswith("    ") for line in lines):  # a formula
        return text
    item = next((kind for kind in (COLUMNS, ARGUMENT) if kind.fullmatch(lines[0])), None)
    return _escaped(text) if item is None else _list(lines, item)


def _list(lines: list[str], item: re.Pattern[str]) -> str:
    out: list[str] = []
    for line in lines:
        if found := item.fullmatch(line):
            out.append(f"- `{found['name']}`: {_escaped(found['text'])}")
        else:
            out.append("    " + _escaped(line.strip()))
    return "\n".join(out)


def _escaped(text: str) -> str:
    """Text with the marks of Markdown as characters, except in `code`."""
    parts = CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\[\]*])", r"\\\1", part).replace("<", "&lt;")
        for part in parts
    )


def _help(value: str) -> str | None:
    """The explanation of a setting: `field(metadata={"help": ...})`."""
    for node in ast.walk(ast.parse(value, mode="eval")):
        if isinstance(node, ast.Dict):
            for key, text in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                    return "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts
                    )
    return None


class Terminal(Extension):
    """Rewrites every docstring, and takes the explanations of settings for docstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if isinstance(obj, Attribute) and obj.docstring is None and str(obj.value).startswith("field("):
            if text := _help(str(obj.value)):
                obj.docstring = Docstring(_escaped(text), parent=obj)
        elif obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
