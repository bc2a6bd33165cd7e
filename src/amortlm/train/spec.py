"""A training run as data, as a YAML file or a built-in task states it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from amortlm.data import as_rows, load_rows
from amortlm.errors import AmortLMError, ConfigError
from amortlm.settings import check_keys, from_text, load_yaml, typed, typed_value

if TYPE_CHECKING:
    from amortlm.support.spec import Support
    from amortlm.targets.functions import Trust
    from amortlm.train.config import GFNConfig
    from amortlm.train.trainer import GFNTrainer


@dataclass(frozen=True)
class RunSpec:
    """Model, prompt, target, support and data of a run, and any `GFNConfig` field under `config`.

    target    terms as in `amortlm.targets.spec`
    data      rows, or a path to .jsonl, .json, .csv or .tsv with a header
    adapter   rank of a LoRA adapter, or "full" for full fine-tuning
    trust     modules whose functions the target may name. The .py files in `folder` (the folder of the YAML file) are
              also trusted. A YAML file cannot set this field
    """

    prompt: str | list[dict[str, Any]]
    target: list[dict[str, Any]]
    support: dict[str, Any]
    data: list[dict[str, Any]] | str
    model: str = "embedded"
    adapter: int | str = 16
    config: dict[str, Any] = field(default_factory=dict)
    trust: Sequence[str] = field(default=(), compare=False)
    folder: str | None = field(default=None, compare=False)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> RunSpec:
        """Read a YAML file, and check what it states with the `overrides` of `with_overrides`. Raises ConfigError,
        DataError or SupportError that name the file, the key, its value and what to write."""
        spec = cls.parsed(path).with_overrides(**overrides)
        try:
            spec.check()
        except AmortLMError as e:
            raise type(e)(f"{path}: {e}") from e
        return spec

    @classmethod
    def parsed(cls, path: str | Path) -> RunSpec:
        """A YAML file with the right keys, whose values are not checked; it needs no torch. Raises ConfigError."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as e:
            hint = f"; amortlm new {path} writes a file to start from" if not path.exists() else ""
            raise ConfigError(f"cannot read {path}: {e.strerror}{hint}") from None
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path} is not UTF-8 text: {e}; save it as UTF-8") from None
        raw = load_yaml(text, str(path))
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must be a mapping with the keys {', '.join(_keys(cls))}")
        if "lora" in raw:
            raise ConfigError(f"{path}: the key lora is now called adapter: write `adapter: {raw['lora']}`")
        check_keys(raw, [key for key in _keys(cls) if key not in ("trust", "folder")], str(path))
        missing = [name for name in ("prompt", "target", "support", "data") if name not in raw]
        if missing:
            raise ConfigError(
                f"{path}: {', '.join(missing)} missing; a run needs prompt, target, support and data"
            )
        if isinstance(raw["data"], str):
            raw["data"] = str(path.parent / raw["data"])
        return cls(**raw, folder=str(path.parent))

    def check(self) -> None:
        """Raise ConfigError, DataError or SupportError for a value that is wrong with any model."""
        hints = get_type_hints(RunSpec)
        for name in ("model", "adapter", "prompt"):
            typed_value(getattr(self, name), hints[name], name)
        if self.adapter != "full" and (isinstance(self.adapter, str) or self.adapter < 1):
            raise ConfigError(f"adapter must be a rank of at least 1, or full, got {self.adapter!r}")
        self.bare_support()
        self.args("")
        if not isinstance(self.data, str):
            self.rows()

    def rows(self) -> list[dict[str, Any]]:
        return load_rows(self.data) if isinstance(self.data, str) else as_rows(self.data, "data")

    def bare_support(self) -> Support:
        """The support, not yet bound to a model. Raises ConfigError, SupportError."""
        from amortlm.support.spec import Support

        check_keys(self.support, _keys(Support), "support")
        if "stop" not in self.support:
            raise ConfigError("support: 'stop' is missing: give the token, or tokens, that end a completion")
        return Support(**typed(self.support, Support, "support"))

    def args(self, output_dir: str) -> GFNConfig:
        """The settings under `config`. Raises ConfigError."""
        from amortlm.train.config import GFNConfig
        from amortlm.train.renamed import refuse_renamed

        if isinstance(self.config, dict):
            refuse_renamed(self.config)
        check_keys(self.config, _keys(GFNConfig), "config")
        try:
            return GFNConfig(**{**typed(self.config, GFNConfig, "config"), "output_dir": output_dir})
        except AmortLMError:
            raise
        except Exception as e:  # transformers raises many types of errors for wrong settings
            raise ConfigError(f"config: {e}") from e

    def with_overrides(self, **given: Any) -> RunSpec:
        """A copy in which the arguments that are not None replace fields; `config` is merged into the old one."""
        given = {k: v for k, v in given.items() if v is not None}
        more = given.pop("config", None)
        if more and isinstance(self.config, dict):  # else `check` says that it is none
            given["config"] = {**self.config, **more}
        return replace(self, **given)

    def trainer(self, output_dir: str) -> GFNTrainer:
        """Load the model and build the trainer. Raises ConfigError, DataError, SupportError, TemplateError."""
        from amortlm.language_model import LanguageModel
        from amortlm.targets.spec import target_from_spec
        from amortlm.train import GFNTrainer

        self.check()
        rows = self.rows()
        lm = LanguageModel.from_pretrained(self.model)
        return GFNTrainer(
            lm,
            target=target_from_spec(self.target, lm, self._trust()),
            prompt=self.prompt,
            support=self.bare_support(),
            train_dataset=rows,
            args=self.args(output_dir),
            adapter=self.adapter if isinstance(self.adapter, str) else int(self.adapter),
        )

    def _trust(self) -> Trust:
        from amortlm.targets.functions import Trust

        return Trust(self.trust, None if self.folder is None else Path(self.folder))

    def trust_options(self) -> list[str]:
        """The --trust options that `amortlm sample` needs to import the functions of the target."""
        from amortlm.targets.functions import references

        trust = self._trust()
        modules = dict.fromkeys(reference.partition(":")[0] for reference in references(self.target))
        return [option for module in modules for option in ("--trust", trust.file(module) or module)]

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of the file."""
        return {k: v for k, v in asdict(self).items() if k not in ("trust", "folder")}


def _keys(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.init]


def settings_from_text(pairs: dict[str, str]) -> dict[str, Any]:
    """`config` from the `--set KEY=VALUE` of the command line. Raises ConfigError for an unknown key."""
    from amortlm.train.config import GFNConfig
    from amortlm.train.renamed import refuse_renamed

    refuse_renamed({key: load_yaml(value, f"--set {key}") for key, value in pairs.items()})
    check_keys(pairs, _keys(GFNConfig), "--set")
    hints = get_type_hints(GFNConfig)
    return {key: from_text(value, hints[key]) for key, value in pairs.items()}
