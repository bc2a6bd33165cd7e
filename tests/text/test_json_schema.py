"""JSON schemas as regular expressions: what matches is valid, as the library `jsonschema` judges."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from amortlm import LanguageModel, Support, constraint, narrow
from amortlm.errors import ConfigError
from amortlm.text.json_schema import json_pattern
from amortlm.text.positions import Positions

TEXT = {"type": "string", "pattern": r"^[a-z.]{1,4}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": TEXT, "n": {"type": "integer"}, "ok": {"type": "boolean"}, "a.b*": {"type": "null"}},
        "required": ["n"],
    },
    "all optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
    "any length": {"type": "array", "items": {"enum": ["x", 1, None]}},
    "nested": {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}, "to": {"type": "array", "items": {"$ref": "#/$defs/Point"}}},
        "required": ["at", "to"],
        "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    },
    "string": {"type": "string", "minLength": 2, "maxLength": 5},
    "through two": {
        "$ref": "#/$defs/A",
        "$defs": {
            "A": {"type": "object", "properties": {"q": {"$ref": "#/$defs/B"}}, "required": ["q"]},
            "B": {"type": "object", "properties": {"q": {"$ref": "#/$defs/C"}}, "required": ["q"]},
            "C": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/D"}, "maxItems": 2}]},
            "D": {"type": "boolean"},
        },
    },
    "alternatives": {"type": "string", "pattern": "^ab|c\\$d$"},
    "odd names": {
        "type": "object",
        "properties": {'a"b': {"type": "null"}, "c\\d": {"type": "null"}, "e\nf": {"type": "null"}, "(g|": {"type": "null"}},
        "required": ['a"b', "e\nf"],
    },
    "large and small": {"enum": [10**30, 2**64 + 1, -(2**63) - 1, 9.248652516259453e-05, 0.1, 1e300]},
    "typed values": {"type": "string", "enum": ["ab", "c"], "title": "a note"},
    "empty array": {"type": "array", "items": {"type": "null"}, "maxItems": 0},
    "two to three": {"type": "array", "items": {"anyOf": [{"const": 1}, {"const": 22}]}, "minItems": 2, "maxItems": 3},
    "either": {"anyOf": [{"type": "null"}, TEXT, {"const": {"a": 'say "b"'}}]},
    "enum of signs": {"enum": ["a|b", "(c)", "[d]", "\\e", "é", "1.5", True, False, 2.5, "$", "^"]},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
}  # fmt: skip
CHARACTERS = "".join(map(chr, range(32, 127))) + "é\u0661\u3000\t\n"


def random_match(pattern: Positions, rng: random.Random, longest: int = 200) -> str | None:
    """A text that the pattern matches: a random walk over its positions."""
    readers = dict(zip(CHARACTERS, pattern.readers(CHARACTERS), strict=True))
    reached, text = 1, ""
    while len(text) < longest:
        if reached & pattern.final and rng.random() < 0.3:
            return text
        ways = [(c, pattern.after(reached) & reads) for c, reads in readers.items()]
        ways = [(c, to) for c, to in ways if to]
        if not ways:
            return text if reached & pattern.final else None
        c, reached = rng.choice(ways)
        text += c
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_match_is_valid(name: str) -> None:
    schema, rng = SCHEMAS[name], random.Random(0)
    pattern = Positions(json_pattern(schema))
    found = {text for text in (random_match(pattern, rng) for _ in range(300)) if text is not None}
    assert len(found) >= 2
    for text in found:
        jsonschema.validate(json.loads(text), schema)


INSTANCES: dict[str, list[Any]] = {
    "object": [{"n": 0}, {"name": "a.b", "n": -12, "ok": True, "a.b*": None}, {"n": 3, "a.b*": None}],
    "all optional": [{}, {"a": True}, {"b": False}, {"a": False, "b": True}],
    "array": [[1], [1.5, -2, 0.25]],
    "any length": [[], ["x"], [1, None, "x", "x"]],
    "nested": [{"at": {"x": 1}, "to": []}, {"at": {"x": 1}, "to": [{"x": 0.5}, {"x": 2}]}],
    "string": ["ab", "é…z!", 'a"\\/'],
    "through two": [{"q": {"q": None}}, {"q": {"q": []}}, {"q": {"q": [True, False]}}],
    "alternatives": ["ab", "c$d"],
    "odd names": [{'a"b': None, "e\nf": None}, {'a"b': None, "c\\d": None, "e\nf": None, "(g|": None}],
    "large and small": [10**30, 2**64 + 1, -(2**63) - 1, 9.248652516259453e-05, 0.1, 1e300],
    "typed values": ["ab", "c"],
    "empty array": [[]],
    "two to three": [[1, 22], [22, 22, 1]],
    "either": [None, "ab.", {"a": 'say "b"'}],
    "enum of signs": ["a|b", "(c)", "\\e", 2.5, True],
    "date": ["2026-11-28"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
}
WRONG: dict[str, list[str]] = {
    "object": ['{"name": "a"}', '{"n": 1.5}', '{"n": 1, "x": 2}', '{"n": 1,}', '{"n": 01}', '{"n": ١}'],
    "array": ["[]", "[1, 2, 3, 4]", "[1 2]"],
    "any length": ['["y"]', "[,]"],
    "string": ['"a"', '"abcdef"', '"a"b"', "ab"],
    "through two": ['{"q": {}}', '{"q": null}', '{"q": {"q": [true, false, true]}}'],
    "alternatives": ['"ab', 'c$d"', '"ab|c$d"'],
    "odd names": ['{"a"b": null, "e\\nf": null}'],
    "large and small": ["1e30", "1"],
    "two to three": ["[1]", "[1, 1, 1, 1]"],
    "either": ["nul", '"AB"', '{"a": "say b"}'],
    "enum of signs": ['"a"', '"(c"', '"15"'],
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_instances_match_and_others_do_not(name: str) -> None:
    pattern = Positions(json_pattern(SCHEMAS[name]))
    for value in INSTANCES[name]:
        jsonschema.validate(value, SCHEMAS[name])
        assert pattern.matches(json.dumps(value, ensure_ascii=False)), value
        assert pattern.matches(json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value
    assert not any(pattern.matches(text) for text in WRONG.get(name, []))


NULL = {"type": "null"}
REFUSED: list[tuple[Any, str]] = [
    ({"type": "integer", "minimum": 0}, "#: 'minimum' is not translated beside type"),
    ({"type": "array", "items": NULL, "uniqueItems": True}, "'uniqueItems'"),
    ({"oneOf": [NULL]}, "type must be one of"),
    (
        {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 2}}},
        "#/properties/a: 'multipleOf'",
    ),
    ({"type": ["string", "null"]}, "for several, write anyOf"),
    ({"type": "object"}, "an object needs properties"),
    ({"type": "object", "properties": 5}, "an object needs properties"),
    ({"type": "object", "properties": ["a"]}, "an object needs properties"),
    ({"type": "array"}, "an array needs items"),
    ({"type": "object", "properties": {"a": NULL}, "required": ["b"]}, "names that are in properties"),
    ({"type": "object", "properties": {"a": NULL}, "required": "a"}, "names that are in properties"),
    ({"type": "object", "properties": {"a": NULL}, "required": 5}, "names that are in properties"),
    ({"type": "object", "properties": {"a": NULL}, "additionalProperties": NULL}, "must be false"),
    ({"type": "string", "properties": {"a": NULL}}, "'properties' is not translated"),
    ({"type": "string", "format": "date-time"}, "format must be one of"),
    ({"type": "string", "pattern": ".*"}, "has to escape"),
    ({"type": "string", "pattern": 5}, "a pattern is text"),
    ({"type": "string", "pattern": "a^b"}, "cannot contain"),
    (
        {"type": "string", "pattern": "a+", "maxLength": 2},
        "'maxLength' is not translated beside pattern, type",
    ),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength=3 is above maxLength=2"),
    ({"type": "string", "minLength": 2.0}, "minLength must be a whole number"),
    ({"type": "array", "items": NULL, "maxItems": -1}, "maxItems must be a whole number"),
    ({"type": "array", "items": NULL, "minItems": True}, "minItems must be a whole number"),
    ({"enum": []}, "at least one entry"),
    ({"anyOf": []}, "at least one entry"),
    ({"anyOf": 5}, "at least one entry"),
    ({"type": "integer", "enum": ["a"]}, "not of type 'integer'"),
    ({"type": "string", "enum": ["ab"], "maxLength": 1}, "'maxLength' is not translated"),
    ({"const": 1, "enum": [2]}, "'enum' is not translated beside const"),
    ({"const": float("nan")}, "a value is not JSON"),
    ({"const": {1, 2}}, "a value is not JSON"),
    ({"anyOf": [NULL], "type": "string"}, "'type' is not translated beside anyOf"),
    ({"$ref": "#/$defs/T", "maxLength": 2, "$defs": {"T": NULL}}, "'maxLength' is not translated"),
    (
        {"$ref": "#/$defs/T", "$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}}},
        "refers to itself",
    ),
    ({"$ref": "#/$defs/T", "$defs": {"T": {"$id": "x", "type": "null"}}}, r"'\$id' is not translated"),
    ({"$ref": "#/$defs/T"}, "is not in the schema"),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a~1b": NULL}}, "is not in the schema"),
    ({"$ref": "http://example.org/x"}, "is not in the schema"),
    ({"$ref": 5}, "is not in the schema"),
    ({"type": "array", "items": True}, "must be a mapping with a type"),
    ([], "a JSON schema is a mapping"),
    ({}, "type must be one of"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_is_not_translated_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        json_pattern(schema)


def test_a_posterior_over_json(embedded: LanguageModel) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["b", "c"]}, "d": {"type": "boolean"}},
        "required": ["a"],
    }
    target = embedded.log_prob("{z}", given="{x}") + constraint.json_schema(schema)
    support, _ = narrow(Support(stop="</s>", max_tokens=12), target, embedded)
    law = support.bind(embedded)
    texts = (
        {embedded.decode(z).strip() for n in range(1, 13) for z in law.completions(n)}
        if law.size() < 10**5
        else set()
    )
    for text in texts or [embedded.decode(next(law.completions(12))).strip()]:
        jsonschema.validate(json.loads(text), schema)
    assert law.contains(embedded.encode_continuation('{"a":"b"}'))
