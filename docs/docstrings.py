"""The docstrings of amortlm as Markdown, for the page docs/reference.md: an extension of griffe (zensical.toml).

Docstrings are written for the terminal: names in one column, their meaning in the next, shapes in brackets.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from importlib import import_module
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


def _field(attribute: Attribute) -> tuple[str, str]:
    """Default and explanation of a setting, `field(default=..., metadata={"help": ...})`."""
    assert attribute.parent is not None
    owner = getattr(import_module(attribute.module.path), attribute.parent.name)
    setting = next(one for one in fields(owner) if one.name == attribute.name)
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return repr(default), setting.metadata.get("help", "")


class Terminal(Extension):
    """Rewrites every docstring; settings get their default, and their explanation as docstring."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        if attr.docstring is None and "metadata=" in str(attr.value):
            attr.value, text = _field(attr)  # before griffe makes a signature of it
            if text:
                attr.docstring = Docstring(text, parent=attr)

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
