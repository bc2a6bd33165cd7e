"""The public API as text: `python tests/helpers/public_api.py` writes it to tests/public_api.txt.

A line for each public name, and for each public method, property and field that amortlm defines for it. What a class
inherits from torch, transformers or Python is left out, so the text depends on amortlm alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import amortlm

FILE = Path(__file__).parents[1] / "public_api.txt"


def describe() -> str:
    return "".join(f"{line}\n" for name in amortlm.__all__ for line in lines(name, getattr(amortlm, name)))


def lines(name: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, ModuleType):
        yield f"module {name}"
        for member, value in vars(thing).items():
            home = getattr(value, "__module__", None) or ""
            if not member.startswith("_") and (
                home == thing.__name__ or home.startswith(f"{thing.__name__}.")
            ):
                yield from lines(f"{name}.{member}", value)
    elif isinstance(thing, type):
        yield from _class(name, thing)
    elif callable(thing):
        yield f"{name}{_text(inspect.signature(thing))}"
    else:
        yield f"{name}: {type(thing).__name__}"


def _class(name: str, kind: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    own = [base for base in reversed(kind.__mro__) if base.__module__.startswith("amortlm")]
    if dataclasses.is_dataclass(kind):
        every = {field.name: field for field in dataclasses.fields(kind)}
        stated = dict.fromkeys(field for base in own for field in vars(base).get("__annotations__", {}))
        for field in (every[field] for field in stated if field in every and not field.startswith("_")):
            yield f"  {name}.{field.name}: {field.type}{_default(field)}"
    elif any("__init__" in vars(base) for base in own):
        yield f"  {name}{_without_self(kind.__init__)}"
    members = {member: value for base in own for member, value in vars(base).items()}
    for member, value in sorted(members.items()):
        if not member.startswith("_"):
            yield from (f"  {name}.{line}" for line in _member(member, value))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return ""


def _member(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, property):
        yield f"{name}: {inspect.signature(value.fget).return_annotation}"
    elif isinstance(value, classmethod | staticmethod):
        first = isinstance(value, classmethod)
        kind = "class" if first else "static"
        signature = _without_self(value.__func__) if first else _text(inspect.signature(value.__func__))
        yield f"{name}{signature} [{kind} method]"
    elif inspect.isfunction(value):
        yield f"{name}{_without_self(value)}"


def _without_self(function: Any) -> str:
    signature = inspect.signature(function)
    _, *rest = signature.parameters.values()
    return _text(signature.replace(parameters=rest))


def _text(signature: inspect.Signature) -> str:
    """As it is written: annotations, which are strings, without quotes."""
    return re.sub(r"""(: |-> )(['"])(.*?)\2""", r"\1\3", str(signature))


if __name__ == "__main__":
    FILE.write_text(describe(), encoding="utf-8")
    print(f"wrote {FILE}")
