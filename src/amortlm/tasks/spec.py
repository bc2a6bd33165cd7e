"""A whole training run as data: what a YAML file or a built-in task states."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.errors import AmortLMError, ConfigError, DataError, nearest
from amortlm.types import Row

if TYPE_CHECKING:
    from amortlm.targets.functions import Trust
    from amortlm.train.trainer import GFNTrainer


@dataclass(frozen=True)
class RunSpec:
    """model, prompt, target, support and data of a run, and any `GFNConfig` field under `config`.

    target   terms as in `amortlm.targets.spec`
    data     rows, or a path to .jsonl, .json, .csv or .tsv with a header
    lora     rank of the adapter, or "full" for full fine-tuning
    trust    modules whose functions the target may name, beside the .py files in `folder`, that of the YAML file; both
             are the user's to say, not the file's
    """

    prompt: Any
    target: list[dict[str, Any]]
    support: dict[str, Any]
    data: list[dict[str, Any]] | str
    model: str = "embedded"
    lora: int | str = 16
    config: dict[str, Any] = field(default_factory=dict)
    trust: Sequence[str] = field(default=(), compare=False)
    folder: str | None = field(default=None, compare=False)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunSpec:
        """Read a YAML file. Raises ConfigError for unknown or missing keys, with the nearest valid name."""
        import yaml

        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text())
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from None
        except yaml.YAMLError as e:
            raise ConfigError(f"{path} is not valid YAML: {e}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must be a mapping with the keys {', '.join(_keys(cls))}")
        check_keys(raw, [key for key in _keys(cls) if key not in ("trust", "folder")], str(path))
        missing = [name for name in ("prompt", "target", "support", "data") if name not in raw]
        if missing:
            raise ConfigError(
                f"{path}: {', '.join(missing)} missing; a run states prompt, target, support and data"
            )
        if isinstance(raw["data"], str):
            raw["data"] = str(path.parent / raw["data"])
        return cls(**raw, folder=str(path.parent))

    def rows(self) -> list[Row]:
        return load_rows(self.data) if isinstance(self.data, str) else _checked_rows(self.data, "data")

    def with_overrides(self, **given: Any) -> RunSpec:
        """A copy with the arguments that are not None; `config` is merged."""
        given = {k: v for k, v in given.items() if v is not None}
        config = {**self.config, **given.pop("config", {})}
        return replace(self, **given, config=config)

    def trainer(self, output_dir: str) -> GFNTrainer:
        """Load the model and build the trainer. Raises ConfigError, DataError, SupportError, TemplateError."""
        from amortlm.language_model import LanguageModel
        from amortlm.policy import Support, default_lora
        from amortlm.targets.spec import target_from_spec
        from amortlm.train import GFNConfig, GFNTrainer

        check_keys(self.config, _keys(GFNConfig), "config")
        check_keys(self.support, _keys(Support), "support")
        try:
            support = Support(**self.support)
            args = GFNConfig(**{**_numbers(self.config, GFNConfig), "output_dir": output_dir})
        except AmortLMError:
            raise
        except (TypeError, ValueError) as e:
            raise ConfigError(f"support or config: {e}") from e
        lm = LanguageModel.from_pretrained(self.model)
        return GFNTrainer(
            lm,
            target=target_from_spec(self.target, lm, self._trust()),
            prompt=self.prompt,
            support=support,
            train_dataset=self.rows(),
            args=args,
            peft_config=self.lora if isinstance(self.lora, str) else default_lora(self.lora),
        )

    def _trust(self) -> Trust:
        from amortlm.targets.functions import Trust

        return Trust(self.trust, None if self.folder is None else Path(self.folder))

    def trust_options(self) -> list[str]:
        """What `amortlm sample` has to be told, for the functions of the target."""
        from amortlm.targets.functions import references

        trust = self._trust()
        modules = dict.fromkeys(reference.partition(":")[0] for reference in references(self.target))
        return [option for module in modules for option in ("--trust", trust.file(module) or module)]

    def to_dict(self) -> dict[str, Any]:
        """What the file states."""
        return {k: v for k, v in asdict(self).items() if k not in ("trust", "folder")}


def _keys(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.init]


def check_keys(given: dict[str, Any], valid: Sequence[str], where: str) -> None:
    """Raise ConfigError for a key that is not valid, naming the nearest that is."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must be a mapping of settings, got {given!r}")
    for key in given:
        if key not in valid:
            close = nearest(key, valid).split("Valid:")[0]
            listing = f"Valid: {', '.join(sorted(valid))}." if len(valid) < 20 else ""
            raise ConfigError(
                f"{where}: unknown key {key!r}; {close or 'no such setting. '}{listing}".strip()
            )


def _numbers(config: dict[str, Any], cls: type) -> dict[str, Any]:
    """The settings with numbers for strings such as "1e-3", which YAML does not read as a number."""
    numeric = {f.name: type(f.default) for f in fields(cls) if type(f.default) in (int, float)}
    out = dict(config)
    for key, value in config.items():
        if key in numeric and isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                raise ConfigError(f"config: {key} must be a number, got {value!r}") from None
            out[key] = int(number) if numeric[key] is int and number.is_integer() else number
    return out


def load_rows(path: str | Path) -> list[Row]:
    """Rows of a .jsonl, .json, .csv or .tsv file. Raises DataError naming what is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise DataError(f"cannot read data file {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"data file {path} is not UTF-8 text: {e}") from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix in (".csv", ".tsv"):
            rows = list(csv.DictReader(StringIO(text), delimiter="," if path.suffix == ".csv" else "\t"))
            if any(None in row for row in rows):
                raise DataError(f"data file {path}: a line has more values than the header has columns")
        else:
            raise DataError(f"data file {path}: use .jsonl, .json, .csv or .tsv")
    except json.JSONDecodeError as e:
        raise DataError(f"data file {path}: {e}") from None
    return _checked_rows(rows, f"data file {path}")


def _checked_rows(rows: Any, what: str) -> list[Row]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{what} has no rows; it needs one mapping of column to value per row")
    return rows
