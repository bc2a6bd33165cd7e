"""JSON schemas as regular expressions: texts that are JSON of a stated form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amortlm.errors import ConfigError
from amortlm.text.positions import Positions

NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
AT_THE_ROOT = {"$schema", "$id", "$defs", "definitions"}
SPACE = " ?"  # between parts; a model may write any white space forever
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\bfnrt])'  # of a string; escaped where it must be
ESCAPED = '"\\' + "".join(map(chr, range(32)))
NUMBER = r"-?(?:0|[1-9][0-9]*)"
HEX = "[0-9a-f]"
FORMATS = {
    "date": "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])",
    "uuid": f"{HEX}{{8}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{12}}",
}
PLAIN = {
    "integer": NUMBER,
    "number": rf"{NUMBER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "boolean": "(?:true|false)",
    "null": "null",
}
IS: dict[str, Callable[[Any], bool]] = {  # of a value that Python's json reads
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def json_pattern(schema: Mapping[str, Any]) -> str:
    """The regular expression of JSON texts that are valid under a schema, for `constraint.matches` or a support.

    Every text that it matches is valid. Not every valid text matches: properties stand in the order of the schema,
    those that it does not name do not occur, at most one space stands between parts, characters are escaped where they
    must be, numbers of `const` and `enum` are written as Python writes them, and a string's `pattern`, an expression of
    Python's `re`, is matched by the whole string. A format is a shape: 2026-02-31 is a date.
    Raises ConfigError for what is not a schema, for keywords or combinations of keywords that are not translated, and
    for a schema that refers to itself.
    """
    if not isinstance(schema, Mapping):
        raise ConfigError(f"a JSON schema is a mapping such as {{'type': 'object', ...}}, got {schema!r}")
    return _Translation(schema).of({k: v for k, v in schema.items() if k not in AT_THE_ROOT}, "#", ())


@dataclass(frozen=True)
class _Translation:
    """Of the parts of one schema. where: the place of a part, for errors; refs: the references that lead to it."""

    schema: Mapping[str, Any]

    def of(self, part: Any, where: str, refs: tuple[str, ...]) -> str:
        if not isinstance(part, Mapping):
            raise _error(where, f"must be a mapping with a type, got {part!r}")
        given = {k: v for k, v in part.items() if k not in NOTES}
        for word, read in (("$ref", self._ref), ("anyOf", self._any_of)):
            if word in given:
                _only(given, {word}, where)
                return read(given[word], where, refs)
        for word in ("const", "enum"):
            if word in given:
                _only(given, {word, "type"}, where)
                return _one_of([given[word]] if word == "const" else given[word], given.get("type"), where)
        kind = given.get("type")
        if not isinstance(kind, str) or kind not in IS:
            raise _error(
                where, f"type must be one of {', '.join(IS)}, got {kind!r}; for several, write anyOf"
            )
        if kind in PLAIN:
            _only(given, {"type"}, where)
            return PLAIN[kind]
        if kind == "string":
            return _string(given, where)
        return self._array(given, where, refs) if kind == "array" else self._object(given, where, refs)

    def _ref(self, ref: Any, where: str, refs: tuple[str, ...]) -> str:
        if ref in refs:
            raise _error(where, f"{ref} refers to itself, which no regular expression can; write it out")
        part: Any = self.schema
        try:
            start, *path = ref.split("/")
            if start != "#" or set(ref) & set("~%"):
                raise KeyError(ref)
            for name in path:
                part = part[name]
        except (KeyError, TypeError, AttributeError):
            raise _error(where, f"{ref!r} is not in the schema; write '#/$defs/name'") from None
        return self.of(part, f"{where}/{ref}", (*refs, ref))

    def _any_of(self, parts: Any, where: str, refs: tuple[str, ...]) -> str:
        return _union(
            [
                self.of(part, f"{where}/anyOf/{i}", refs)
                for i, part in enumerate(_listed(parts, "anyOf", where))
            ]
        )

    def _array(self, given: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        _only(given, {"type", "items", "minItems", "maxItems"}, where)
        if "items" not in given:
            raise _error(where, "an array needs items")
        item = self.of(given["items"], f"{where}/items", refs)
        low, high = _bounds(given, "minItems", "maxItems", where)
        if high == 0:
            return rf"\[{SPACE}\]"
        count = _count(max(low - 1, 0), None if high is None else high - 1)
        items = f"(?:{item})(?:{SPACE},{SPACE}(?:{item})){count}"
        return rf"\[{SPACE}(?:{items}){'?' if low == 0 else ''}{SPACE}\]"

    def _object(self, given: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        _only(given, {"type", "properties", "required", "additionalProperties"}, where)
        properties, required = given.get("properties"), given.get("required", [])
        if (
            not isinstance(properties, Mapping)
            or not properties
            or not all(isinstance(k, str) for k in properties)
        ):
            raise _error(
                where, f"an object needs properties, a mapping from names to schemas; got {properties!r}"
            )
        if not isinstance(given.get("additionalProperties", False), bool):
            raise _error(
                where, "additionalProperties must be false; no property that is not named is written"
            )
        if (
            not isinstance(required, Sequence)
            or isinstance(required, str)
            or any(r not in properties for r in required)
        ):
            raise _error(where, f"required must be a list of names that are in properties, got {required!r}")
        pairs = [
            f"{_value(name)}{SPACE}:{SPACE}(?:{self.of(part, f'{where}/properties/{name}', refs)})"
            for name, part in properties.items()
        ]
        return rf"\{{{SPACE}{_members(pairs, [name in required for name in properties])}{SPACE}\}}"


def _members(pairs: Sequence[str], required: Sequence[bool]) -> str:
    """The pairs in their order, with commas; those that are not required may be missing."""
    after = [
        f"(?:{SPACE},{SPACE}{pair}){'' if must else '?'}" for pair, must in zip(pairs, required, strict=True)
    ]
    if True not in required:
        return f"{_union([pair + ''.join(after[i + 1 :]) for i, pair in enumerate(pairs)])}?"
    first = required.index(True)
    before = [f"(?:{pair}{SPACE},{SPACE})?" for pair in pairs[:first]]
    return "".join([*before, pairs[first], *after[first + 1 :]])


def _string(given: Mapping[str, Any], where: str) -> str:
    for word in ("pattern", "format"):
        if word in given:
            _only(given, {"type", word}, where)
            return (
                f'"(?:{_format(given[word], where) if word == "format" else _pattern(given[word], where)})"'
            )
    _only(given, {"type", "minLength", "maxLength"}, where)
    return f'"{CHARACTER}{_count(*_bounds(given, "minLength", "maxLength", where))}"'


def _format(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in FORMATS:
        raise _error(where, f"format must be one of {', '.join(FORMATS)}, got {name!r}; state a pattern")
    return FORMATS[name]


def _pattern(pattern: Any, where: str) -> str:
    """Without the anchors at its ends. Raises ConfigError if it matches what a JSON string has to escape."""
    if not isinstance(pattern, str):
        raise _error(where, f"a pattern is text, got {pattern!r}")
    bare = pattern.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", bare):
        bare = bare[:-1]
    if any(Positions(f"(?:{bare})").readers(ESCAPED)):
        raise _error(
            where,
            f"pattern {pattern!r} matches characters that a JSON string has to escape (quotation marks, backslashes, "
            r'line breaks); exclude them, as in [^"\\\x00-\x1f]*',
        )
    return bare


def _one_of(values: Any, kind: Any, where: str) -> str:
    values = _listed(values, "enum", where)
    if kind is not None and (not isinstance(kind, str) or kind not in IS or not all(map(IS[kind], values))):
        raise _error(where, f"the values {values!r} are not of type {kind!r}")
    try:
        return _union([_value(value) for value in values])
    except (TypeError, ValueError) as e:
        raise _error(where, f"a value is not JSON: {e}") from None


def _value(value: Any) -> str:
    """The texts of one value."""
    if isinstance(value, Mapping):
        inside = [f"{_value(str(k))}{SPACE}:{SPACE}{_value(v)}" for k, v in value.items()]
        return rf"\{{{SPACE}{f'{SPACE},{SPACE}'.join(inside)}{SPACE}\}}"
    if isinstance(value, list | tuple):
        return rf"\[{SPACE}{f'{SPACE},{SPACE}'.join(map(_value, value))}{SPACE}\]"
    return re.escape(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _union(patterns: Sequence[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


def _count(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _bounds(given: Mapping[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = given.get(least, 0), given.get(most)
    for name, n in ((least, low), (most, high)):
        if n is not None and (type(n) is not int or n < 0):
            raise _error(where, f"{name} must be a whole number, 0 or above, got {n!r}")
    if high is not None and low > high:
        raise _error(where, f"{least}={low} is above {most}={high}")
    return low, high


def _listed(values: Any, word: str, where: str) -> list[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise _error(where, f"{word} must be a list with at least one entry, got {values!r}")
    return list(values)


def _only(given: Mapping[str, Any], words: set[str], where: str) -> None:
    """Raise ConfigError for keywords that are not translated here."""
    others = sorted(map(str, given.keys() - words))
    if others:
        raise _error(
            where,
            f"{others[0]!r} is not translated beside {', '.join(sorted(words & given.keys())) or 'nothing else'}; take "
            "it out, or judge it by a constraint.predicate",
        )


def _error(where: str, why: str) -> ConfigError:
    return ConfigError(f"JSON schema: {where}: {why}")
