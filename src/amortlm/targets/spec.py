"""Targets as JSON or YAML: a list of terms, each with an optional weight or temperature.

- log_prob: {of: "{z}{y}", given: "{x}"}
  temperature: 0.8
- contains: [dog, park]
  penalty: 10
- matches: "[A-Z].*"
- json_schema: {type: object, properties: ...}  # saved as `matches`
- grammar: 'root ::= "yes" | "no"'  # or {source: ..., depth: 2}; saved as `matches`
- length: {minimum: 3, maximum: 12}
- allowed_tokens: [" a", " b"]
- canonical: true
- predicate: my_package.rules:is_polite  # or {function: ..., timeout: 5}
- distinct: true
- relation: my_package.rules:rhymes  # a predicate of statements
- unordered: {target: [{log_prob: {of: "{z}"}}], separator: ","}
- verifier: {function: "my_package.rules:score", every_prefix: false, timeout: 30}

Functions are references, imported only from modules that the user trusts (`amortlm.targets.functions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from amortlm.engine.model import CausalLM
from amortlm.errors import ConfigError, nearest
from amortlm.settings import typed_value
from amortlm.targets import constraints as c
from amortlm.targets.base import LinearCombination, Target
from amortlm.targets.functions import Trust
from amortlm.targets.lists import Unordered
from amortlm.targets.statements import log_prob

NOBODY = Trust()
MODIFIERS = {"weight", "temperature", "penalty"}
# Types of the arguments of each term in JSON/YAML. A name that is not listed is unknown to the term.
ARGUMENTS: dict[str, Any] = {
    "log_prob": {"of": str, "given": str | list[dict[str, Any]]},
    "contains": str | list[str],
    "matches": str,
    "json_schema": dict[str, Any],
    "grammar": {"source": str, "depth": int | None},
    "allowed_tokens": str | int | list[str | int],
    "canonical": bool,
    "length": {"minimum": int, "maximum": int | None},
    "predicate": {"function": str, "timeout": float | None},
    "distinct": bool,
    "relation": {"function": str, "timeout": float | None},
    "unordered": {"target": list[dict[str, Any]], "separator": str | int},
    "verifier": {"function": str, "every_prefix": bool, "timeout": float | None},
}

# Terms that may be written as this argument alone.
SHORT = {"predicate": "function", "relation": "function", "grammar": "source"}


def _builders(lm: CausalLM, trust: Trust = NOBODY) -> dict[str, Callable[[Any, dict[str, Any]], Target]]:
    return {
        "log_prob": lambda a, k: log_prob(lm, **a, **k),
        "contains": lambda a, k: c.Contains(_listed(a), **k),
        "matches": lambda a, k: c.Matches(a, **k),
        "json_schema": lambda a, k: c.json_schema(a, **k),
        "grammar": lambda a, k: c.grammar(**a, **k),
        "allowed_tokens": lambda a, k: c.AllowedTokens(_listed(a), **k),
        "canonical": lambda a, k: _flag(c.Canonical, a, **k),
        "length": lambda a, k: c.Length(**a, **k),
        "predicate": lambda a, k: c.Predicate(trust.find(a.pop("function")), **a, **k),
        "distinct": lambda a, k: _flag(c.Distinct, a, **k),
        "relation": lambda a, k: c.Relation(trust.find(a.pop("function")), **a, **k),
        "unordered": lambda a, k: Unordered(target_from_spec(a.pop("target"), lm, trust), **a, **k),
        "verifier": lambda a, k: c.Verifier(trust.find(a.pop("function")), **a, **k),
    }


def _flag(kind: type[c.Constraint], wanted: Any, **extra: float) -> Target:
    """A constraint without arguments. Raises ConfigError for anything but true."""
    term = kind(**extra)
    if wanted is not True:
        name = term.settings()[0]
        raise ConfigError(f"{name}: {wanted!r}: write `{name}: true`, or leave the term out")
    return term


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | int) else list(value)


def _arguments(name: str, given: Any) -> Any:
    """The arguments of a term, converted to the types of `ARGUMENTS`. Raises ConfigError."""
    declared, where = ARGUMENTS[name], f"target term {name!r}"
    if name in SHORT and not isinstance(given, dict):
        given = {SHORT[name]: given}
    if not isinstance(declared, dict):
        return typed_value(given, declared, where)
    if not isinstance(given, dict):
        raise ConfigError(f"{where} with {given!r}: write a mapping with {', '.join(declared)}")
    return {
        key: typed_value(value, declared.get(key, Any), f"{where}: {key}") for key, value in given.items()
    }


def _number(term: dict[str, Any], name: str) -> float:
    value = float(typed_value(term[name], float, f"{name} of a target term"))
    if not math.isfinite(value):
        raise ConfigError(f"{name} of a target term must be finite, got {value}")
    return value


def target_from_spec(spec: Sequence[dict[str, Any]], lm: CausalLM, trust: Trust = NOBODY) -> Target:
    """Build a target from its JSON/YAML form. trust: modules whose functions it may name (default: only those of
    amortlm).

    Raises ConfigError for an unknown term, bad arguments, or a function that is not trusted.
    """
    if not isinstance(spec, Sequence) or isinstance(spec, str) or not spec:
        raise ConfigError(
            "target must be a list of terms, each a mapping such as {log_prob: {of: ..., given: ...}}"
        )
    builders = _builders(lm, trust)
    terms: list[tuple[float, Target]] = []
    for term in spec:
        if not isinstance(term, dict):
            raise ConfigError(f"a target term is a mapping such as {{contains: [dog]}}, got {term!r}")
        names = set(term) - MODIFIERS
        unknown = names - set(builders)
        if unknown:
            name = min(map(str, unknown))
            raise ConfigError(f"unknown target term {name!r}; {nearest(name, [*builders, *MODIFIERS])}")
        if len(names) != 1:
            raise ConfigError(f"a target term names exactly one of {sorted(builders)}, got {sorted(term)}")
        name = names.pop()
        arguments = _arguments(name, term[name])
        extra = {"penalty": _number(term, "penalty")} if "penalty" in term else {}
        try:
            built = builders[name](arguments, extra)
        except (TypeError, KeyError, AttributeError) as e:
            raise ConfigError(f"target term {name!r} with {term[name]!r}: {e}") from e
        weight = _number({"weight": 1.0, **term}, "weight")
        temperature = _number({"temperature": 1.0, **term}, "temperature")
        if temperature <= 0:
            raise ConfigError(f"the temperature of a target term must be positive, got {temperature:g}")
        weight /= temperature
        terms += [(weight * w, t) for w, t in built.terms]
    return LinearCombination(terms).bind(lm)
