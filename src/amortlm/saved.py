"""The folder of a saved posterior: reading and checking `posterior.json`, and loading the model that it names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from amortlm.engine import gguf, quantised
from amortlm.engine.adapter import FULL
from amortlm.errors import ConfigError
from amortlm.language_model import EMBEDDED, LanguageModel
from amortlm.posterior_file import REPOSITORY, damaged, parsed
from amortlm.support.spec import Support
from amortlm.support.tools import Tool

logger = logging.getLogger(__name__)


def read(folder: Path) -> dict[str, Any]:
    """The content of `posterior.json`, with every value of the right type. Raises CheckpointError."""
    spec = parsed(folder)
    try:
        _check(spec)
    except (KeyError, TypeError) as e:
        raise damaged(folder, e) from e
    return spec


def _check(spec: dict[str, Any]) -> None:
    """Raise KeyError for a missing value, TypeError for one of the wrong type. The content of a value is checked where
    it is used."""
    prompt, support, target = spec["prompt"], spec["support"], spec["target"]
    texts = (
        [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt] + [m["role"] for m in prompt]
    )
    known = {f.name for f in fields(Support)}
    right = {
        "format": type(spec["format"]) is int,
        "model": isinstance(spec["model"], str | None),
        "weights": spec["weights"] in (FULL, "adapter"),
        "prompt": bool(texts) and all(isinstance(t, str) for t in texts),
        "support": isinstance(support, dict) and set(support) <= known and "stop" in support,
        "target": isinstance(target, list | None),
        "tokenizer": isinstance(spec.get("tokenizer"), str | None),
        "chat_template_kwargs": isinstance(spec.get("chat_template_kwargs", {}), dict),
        "quantization": isinstance(spec.get("quantization"), dict | None),
    }
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise TypeError(f"{wrong[0]} cannot be {str(spec.get(wrong[0]))[:80]}")


def model_name(name: str) -> str | None:
    """The name of a model in `posterior.json`: a folder by its full path, with the home directory written as "~", so
    that it is found from any working directory; any other name as it is. None without a name."""
    if not name or not Path(name).is_dir():
        return name or None
    path, home = Path(name).resolve(), Path.home().resolve()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def hub_id(name: str | None) -> str | None:
    """The repository of a model on the hub: its name, or that before a GGUF file. None for the model that ships, and
    for files on this machine."""
    place = Path(name).parent.as_posix() if name and name.endswith(gguf.SUFFIX) else name
    if not name or not place or name == EMBEDDED or not REPOSITORY.fullmatch(place):
        return None
    return None if os.path.exists(name) else place


def load_model(folder: Path, spec: dict[str, Any], name: str | Path | None) -> LanguageModel:
    """The frozen model of a saved posterior, or the one of that name. Raises ConfigError."""
    wanted = name or spec["model"]
    if not wanted:
        raise ConfigError(
            f"{folder}: its model had no name when it was saved; give the model: lm= in from_pretrained, or --model"
        )
    try:
        packing = spec.get("quantization")
        given: dict[str, Any] = {} if packing is None else {"quantization_config": quantised.config(packing)}
        lm = LanguageModel.from_pretrained(os.path.expanduser(wanted), **given)
    except ConfigError as e:
        raise ConfigError(
            f"{folder}: {e}\nIf the model has moved, give its new place: lm= in from_pretrained, or --model."
        ) from e
    if spec.get("chat_template_kwargs"):
        lm.chat_template_kwargs = dict(spec["chat_template_kwargs"])
    return lm


def support_of(spec: dict[str, Any], tool: Tool | None) -> Support:
    """The saved support; tool: in place of its own. Raises ConfigError if that was not saved and no tool is given."""
    if tool is None and "tool_not_saved" in spec:
        raise ConfigError(f"its tool was not saved ({spec['tool_not_saved']}): give tool= to from_pretrained")
    support = Support(**spec["support"])
    return support if tool is None else replace(support, tool=tool)


def check_model(folder: Path, spec: dict[str, Any], lm: LanguageModel) -> None:
    """Warn if the model may tokenise prompts differently from the model with which the posterior was saved, or is
    quantised differently."""
    if spec.get("tokenizer") not in (None, tokenizer_hash(lm.tokenizer)):
        logger.warning(
            "%s: the tokenizer of %s differs from the one this posterior was saved with, and is used nevertheless. If "
            "texts look wrong, give the model that the posterior was trained on: lm= in from_pretrained, or --model",
            folder,
            lm.name,
        )
    packing, own = spec.get("quantization"), quantised.settings(lm.model)
    if packing != own:
        logger.warning(
            "%s: this posterior was trained on weights quantised with %s, and the given model's with %s (None: not "
            "quantised), so that neither p nor q are those that were trained; leave lm= out, or load it alike",
            folder,
            packing,
            own,
        )
    kwargs = spec.get("chat_template_kwargs") or {}
    if kwargs != lm.chat_template_kwargs:
        logger.warning(
            "%s: this posterior was saved with chat_template_kwargs=%s, but the given model has others; set "
            "lm.chat_template_kwargs",
            folder,
            kwargs,
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of everything that decides how a tokenizer reads texts and messages."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        told = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    else:
        told = tokenizer.get_vocab()
    text = json.dumps([told, tokenizer.chat_template, sorted(tokenizer.all_special_ids)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_base_model(folder: Path, path: str, name: str | None) -> None:
    """In the files of peft, replace the model's path on this machine by the name in `posterior.json`."""
    for file in (folder / "adapter_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        named = [key for key in ("base_model_name_or_path", "_name_or_path") if config.get(key) == path]
        if named and path != name:
            file.write_text(
                json.dumps({**config, **dict.fromkeys(named, name)}, indent=2) + "\n", encoding="utf-8"
            )
    card = folder / "README.md"
    if path and path != name and card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(path, name or "unknown"), encoding="utf-8")
