"""JSON schemas as regular expressions: texts that are JSON of a stated form (extra `[schema]`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from amortlm.errors import ConfigError, MissingExtraError
from amortlm.text.positions import Positions

NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
# What is translated. Other keywords are refused, because `outlines_core` leaves out what it does not know.
KEYWORDS = {
    *("type", "enum", "const", "anyOf", "$ref", "properties", "required", "additionalProperties"),
    *("items", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
}
TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
FORMATS = ("date", "uuid")  # that of times in outlines_core 0.2.14 matches texts that are no JSON
OUTSIDE_STRINGS = '"\\' + "".join(map(chr, range(32)))  # these are escaped in a JSON string
SPACE = " ?"  # between parts; a model may write any white space forever


def json_pattern(schema: Mapping[str, Any]) -> str:
    """The regular expression of JSON texts that are valid under a schema, for `constraint.matches` or a support.

    Every text that it matches is valid. Not every valid text matches: properties stand in the order of the schema,
    those that it does not name do not occur, at most one space stands between parts, characters are escaped where they
    must be, and a string's `pattern` is matched by the whole string. A format is a shape: 2026-02-31 is a date.
    Raises ConfigError for what is not a schema, for keywords that are not translated, and for a schema that refers to
    itself; MissingExtraError without outlines-core.
    """
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError as e:
        raise MissingExtraError("a JSON schema needs outlines-core: pip install 'amortlm[schema]'") from e
    if not isinstance(schema, Mapping):
        raise ConfigError(f"a JSON schema is a mapping such as {{'type': 'object', ...}}, got {schema!r}")
    for part, inside in _parts(schema, schema, ()):
        _check(part, "/".join(("#", *inside)))
    try:
        return f"(?a:{build_regex_from_schema(json.dumps(schema), SPACE, 1)})"
    except (ValueError, TypeError) as e:
        raise ConfigError(f"JSON schema: {e}") from None


def _parts(
    part: Any, whole: Mapping[str, Any], inside: tuple[str, ...], refs: tuple[str, ...] = ()
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Each schema within a schema that can be reached, with its place. Raises ConfigError for a circle."""
    yield part, inside
    if not isinstance(part, Mapping):
        return
    within = [(f"properties/{k}", v) for k, v in dict(part.get("properties", {})).items()]
    within += [("items", part["items"])] if "items" in part else []
    within += [(f"anyOf/{i}", v) for i, v in enumerate(part.get("anyOf", ()))]
    for place, sub in within:
        yield from _parts(sub, whole, (*inside, place), refs)
    if (ref := part.get("$ref")) is not None:
        if ref in refs:
            raise ConfigError(
                f"JSON schema: {ref} refers to itself, which no regular expression can; write it out"
            )
        yield from _parts(_found(ref, whole), whole, (*inside, str(ref)), (*refs, ref))


def _found(ref: Any, whole: Mapping[str, Any]) -> Any:
    part: Any = whole
    try:
        start, *path = str(ref).split("/")
        if start != "#":
            raise KeyError(ref)
        for name in path:
            part = part[name]
    except (KeyError, TypeError):
        raise ConfigError(f"JSON schema: {ref!r} is not in the schema; write '#/$defs/name'") from None
    return part


def _check(part: Any, where: str) -> None:
    """Raise ConfigError for a schema of which not everything is translated."""
    what = f"JSON schema: {where}"
    if not isinstance(part, Mapping):
        raise ConfigError(f"{what} must be a mapping with a type, got {part!r}")
    unknown = sorted(map(str, part.keys() - NOTES - KEYWORDS))
    if unknown:
        raise ConfigError(
            f"{what}: {unknown[0]!r} cannot be a regular expression here; take it out, or judge it by a "
            "constraint.predicate"
        )
    if part.keys() & {"enum", "const", "anyOf", "$ref"}:
        return
    kind = part.get("type")
    if kind not in TYPES:
        raise ConfigError(
            f"{what}: type must be one of {', '.join(TYPES)}, got {kind!r}; for several, write anyOf"
        )
    if kind == "object" and not part.get("properties"):
        raise ConfigError(f"{what}: an object needs properties")
    if part.get("additionalProperties", False) not in (False, True):
        raise ConfigError(
            f"{what}: additionalProperties must be false; no property that is not named is written"
        )
    missing = set(part.get("required", ())) - dict(part.get("properties", {})).keys()
    if missing:
        raise ConfigError(f"{what}: {min(missing)!r} is required, but not in properties")
    if kind == "array" and "items" not in part:
        raise ConfigError(f"{what}: an array needs items")
    if part.get("format") is not None and part["format"] not in FORMATS:
        raise ConfigError(f"{what}: format must be one of {', '.join(FORMATS)}; state a pattern")
    if "pattern" in part and any(Positions(_bare(part["pattern"])).readers(OUTSIDE_STRINGS)):
        raise ConfigError(
            f"{what}: pattern {part['pattern']!r} matches characters that a JSON string has to escape (quotation "
            r'marks, backslashes, line breaks); exclude them, as in [^"\\\n]*'
        )


def _bare(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ConfigError(f"JSON schema: a pattern is text, got {pattern!r}")
    return pattern.removeprefix("^").removesuffix("$")
