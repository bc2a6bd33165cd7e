"""Presets, and `--set KEY=VALUE`: one setting of a preset changed, with the type that it has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from amortlm.errors import ConfigError, nearest
from amortlm.lab.experiment import Settings
from amortlm.settings import from_text, load_yaml, typed_value

OURS = ("output_dir", "seed", "data_seed")  # set by the runner, from --output and --seeds


def read_presets(name: str) -> dict[str, Settings]:
    """The presets of an experiment: `lab/presets/NAME.yaml`."""
    file = Path(__file__).parent / "presets" / f"{name}.yaml"
    return load_yaml(file.read_text(encoding="utf-8"), str(file))


def with_overrides(
    settings: Settings, given: Mapping[str, str], groups: Mapping[str, type] | None = None
) -> Settings:
    """A copy with KEY=VALUE settings, values as typed on the command line; "a.b" is setting b in group a.

    groups: the dataclasses whose fields are settings of a group, whether or not the preset lists them.
    Raises ConfigError for an unknown key, for one of earlier versions and for a value of another type.
    """
    for key in (*settings, *given):
        if key.split(".")[0] == "lora":
            instead = key.replace("lora", "adapter", 1)
            raise ConfigError(f"the setting {key} is now called {instead}: write {instead}")
    groups = {group: kind for group, kind in (groups or {}).items() if group in settings}
    listed = dict(flat(settings))
    declared = {f"{g}.{name}": hint for g, kind in groups.items() for name, hint in _fields(kind).items()}
    out: Settings = json.loads(json.dumps(settings))
    for key, text in given.items():
        *path, last = key.split(".")
        place: Any = out
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if key in declared:
            place[last] = typed_value(from_text(text, declared[key]), declared[key], f"--set {key}")
        elif key in listed:
            place[last] = _like(key, load_yaml(text, f"--set {key}"), listed[key])
        elif isinstance(place, dict) and isinstance(place.get(last), dict):
            inside = ", ".join(sorted(name for name in listed if name.startswith(f"{key}.")))
            raise ConfigError(f"--set {key} is a group of settings; set one of {inside}")
        else:
            valid = sorted(listed.keys() | declared.keys())
            raise ConfigError(f"--set {key}: no such setting; {nearest(key, valid)}")
    return out


def flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.init and f.name not in OURS}


def _like(key: str, value: Any, default: Any) -> Any:
    """`value` as a number where `default` is one (YAML reads 1e-3 as text). Raises ConfigError where it is none."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"--set {key}: expected a number like {default!r}, got {value!r}") from None
    return int(number) if isinstance(default, int) and number.is_integer() else number
