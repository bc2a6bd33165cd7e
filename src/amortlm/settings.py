"""Settings as data: YAML with the scalars of JSON, and values that are checked against declared types."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Never, Union, get_args, get_origin, get_type_hints

import yaml

from amortlm.errors import ConfigError, nearest

# By default PyYAML reads YAML 1.1: `no` is false, `2024-01-01` a date, `1:30` is 90 and `007` is 7. Here all are text.
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(0|[1-9]\d*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?(0|[1-9]\d*)\.\d*([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}

LARGEST = 2**63 - 1  # the largest 64-bit integer


class _Loader(yaml.SafeLoader):
    """Plain scalars as in JSON: true, false, null and decimal numbers are values, everything else is text.

    It refuses tags without a JSON type, keys that are given twice, and values that contain themselves.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # refuses recursion
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def load_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises ConfigError naming the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{what} is not valid YAML: {where}{e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as e:
        raise ConfigError(f"{what} is not valid YAML: {e}") from None


def check_keys(given: Any, valid: Sequence[str], where: str) -> None:
    """Raise ConfigError unless `given` is a mapping with only valid keys; the error names the nearest valid key."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must be a mapping of settings, got {given!r}")
    for key in given:
        if key not in valid:
            close = nearest(str(key), valid).split("Valid:")[0]
            listing = f"Valid: {', '.join(sorted(valid))}." if len(valid) < 20 else ""
            raise ConfigError(
                f"{where}: unknown key {key!r}; {close or 'no such setting. '}{listing}".strip()
            )


def typed(given: Mapping[str, Any], declared: Callable[..., Any], where: str) -> dict[str, Any]:
    """`given` with its values converted to the annotated types of `declared` (a dataclass or a function). Text such as
    "1e-3", which YAML does not read as a number, becomes a number. Raises ConfigError naming the setting and its
    value."""
    hints = get_type_hints(declared)
    return {key: typed_value(value, hints.get(key, Any), f"{where}: {key}") for key, value in given.items()}


def typed_value(value: Any, hint: Any, where: str) -> Any:
    """One value of `typed`."""
    try:
        return _as(value, hint)
    except TypeError:
        quote = ""
        if isinstance(value, int | float) and _fits("", hint):
            quote = f"; to write it as text, quote it: '{str(value).lower()}'"
        raise ConfigError(f"{where} must be {_described(hint)}, got {value!r}{quote}") from None


def from_text(text: str, hint: Any) -> Any:
    """A value of the command line, read as YAML. It stays text if `hint` allows text but not the value read."""
    value = load_yaml(text, repr(text))
    return (
        text if not isinstance(value, list | dict) and not _fits(value, hint) and _fits(text, hint) else value
    )


def named_texts(texts: Sequence[str], option: str) -> dict[str, str]:
    """The NAME=VALUE pairs of a repeated option, each name once. Raises ConfigError for other texts."""
    out: dict[str, str] = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"{option} {text!r}: write {option} NAME=VALUE")
        if key in out:
            raise ConfigError(f"{option} {key}= is given twice")
        out[key] = value
    return out


def _fits(value: Any, hint: Any) -> bool:
    try:
        _as(value, hint)
    except TypeError:
        return False
    return True


def _as(value: Any, hint: Any) -> Any:
    """`value` converted to the type `hint`. Raises TypeError."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        if isinstance(value, str) and str in args:
            return value
        return _as(value, next((arg for arg in args if _fits(value, arg)), Never))
    if kind in (int, float):
        return _number(value, kind)
    if kind in (list, tuple, Sequence):
        return _items(value, kind, args)
    if kind is Literal:
        right = any(value == arg and type(value) is type(arg) for arg in args)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        right = value in [member.value for member in kind]
    else:
        right = kind is Any or (isinstance(kind, type) and isinstance(value, kind))
    if not right:
        raise TypeError
    return value


def _number(value: Any, kind: type) -> int | float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        raise TypeError from None
    if isinstance(number, bool) or not isinstance(number, int | float) or math.isnan(number):
        raise TypeError
    if kind is int:
        if not (isinstance(number, int) or number.is_integer()) or abs(number) > LARGEST:
            raise TypeError
        return int(number)
    return number


def _items(value: Any, kind: Any, args: tuple[Any, ...]) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError
    if kind is not tuple:
        args = (args or (Any,))[:1] * len(value)
    if len(value) != len(args):
        raise TypeError
    return [_as(item, arg) for item, arg in zip(value, args, strict=True)]


PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def _described(hint: Any) -> str:
    """A type in words, without alternatives that cannot be written in a file."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_described, args))))
    if kind is tuple:
        return f"a list of {len(args)}: {', '.join(map(_described, args))}"
    if kind in (list, Sequence):
        return f"a list (of {_described(args[0])})" if args else "a list"
    if kind in (dict, Mapping):
        return "a mapping"
    if kind is Literal:
        return " or ".join(str(arg).lower() for arg in args)
    return "text" if isinstance(kind, type) and issubclass(kind, Enum) else PLAIN.get(kind, "")
