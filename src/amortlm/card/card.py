"""The model card of a saved posterior: README.md, with the metadata that the hub reads (templates/card.md.jinja)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amortlm.card import markdown
from amortlm.card.figures import measured, number, percent, results, row_count
from amortlm.engine import quantised
from amortlm.engine.adapter import FULL
from amortlm.files import write_text
from amortlm.language_model import EMBEDDED, EMBEDDED_PATH
from amortlm.saved import hub_id
from amortlm.support.spec import Support
from amortlm.targets.functions import references
from amortlm.types import Row

if TYPE_CHECKING:
    from jinja2 import Template

    from amortlm.engine.model import CausalLM

FILE = "README.md"
MARK = "<!-- Written by amortlm, and written again by the next save. Delete this line to keep your edits. -->"
PEFT = "# Model Card for Model ID"  # the card that peft writes
PLACE = '"user/name"'  # stands for the repository in the code of a card, and here for a command:
CHECK = "amortlm evaluate user/name --check"
ROWS, SAMPLES, DRAWS = 4, 4, 64  # of a card: rows, samples shown of each, draws behind its figures
TAGS = ("amortlm", "gflownet", "posterior-sampling", "amortized-inference")


@dataclass(frozen=True)
class Base:
    """The frozen model.

    name      hub id, "embedded", or None for a model that is only on the machine of whoever saved the posterior
    about     its architecture and size, in words
    licence   as its own card names it; None if unknown
    """

    name: str | None
    about: str
    licence: str | None = None

    @property
    def hub_id(self) -> str | None:
        return hub_id(self.name)

    def __str__(self) -> str:
        about = markdown.cell(self.about)
        if self.hub_id:
            return f"[{markdown.cell(self.hub_id)}](https://hf.co/{self.hub_id})"
        if self.name:
            return f"`{self.name}`, the language model that ships with amortlm ({about})"
        return f"a language model that is not on the hub ({about})"


def base_of(lm: CausalLM) -> Base:
    """The base model of a posterior; nothing is downloaded."""
    parameters, packing = quantised.numbers(lm.model), quantised.settings(lm.model)
    size = f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
    about = f"{lm.model.config.model_type}, {size} parameters"
    if packing is not None:
        about += f" in 4 bits ({packing['bnb_4bit_quant_type']})"
    if lm.name == EMBEDDED:
        return Base(EMBEDDED, about, licence(EMBEDDED_PATH / FILE))
    name = hub_id(lm.name)
    return Base(name, about, licence(Path(lm.name).expanduser() / FILE if name is None else _cached(name)))


def _cached(repo_id: str) -> str | None:
    """The card of a repository, if the cache of the hub has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, FILE)
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Drawn:
    """Draws of a row: n, of which the first few are shown as (text, log q, weight).

    weight: relative to the mean weight of all n draws; None without a target. ess: share; log_z: nats
    """

    n: int
    ess: float | None
    log_z: float | None
    shown: list[tuple[str, float, float | None]]

    def figures(self) -> dict[str, str]:
        if self.ess is None or self.log_z is None:
            return {"draws": str(self.n)}
        return {"ESS": percent(self.ess), "log Z": number(self.log_z)}

    def lines(self) -> list[dict[str, str]]:
        """The draws that are shown, as lines of a table."""
        return [
            {"completion": markdown.cell(text), "log q": f"{log_q:.2f}"}
            | ({} if weight is None else {"weight": f"{weight:.2f}"})
            for text, log_q, weight in self.shown
        ]


@dataclass(frozen=True)
class Card:
    """Everything that a card says.

    spec         the content of posterior.json
    columns      the columns of prompt and target
    target       the target in words, for a target without a JSON form
    rows         those of which samples are shown
    drawn        draws of each of them
    reports      the diagnosis of these rows, and maybe of more (`RowDiagnosis.to_dict`); without one, figures of the
                 draws are shown
    certificate  (name, sha256) of the certificate's file, if it is about these weights
    """

    spec: Mapping[str, Any]
    base: Base
    columns: Sequence[str]
    target: str
    rows: Sequence[Row] = ()
    drawn: Sequence[Drawn] = ()
    reports: Sequence[Mapping[str, Any]] = ()
    certificate: tuple[str, str] | None = None

    @property
    def is_full(self) -> bool:
        return self.spec["weights"] == FULL

    def __str__(self) -> str:
        texts = {"mark": MARK, "place": PLACE, "check": CHECK, "version": version("amortlm")}
        return _template().render(card=self, metadata=self._metadata(), **texts)

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        figures = results(self.reports)
        return ModelCardData(
            base_model=self.base.hub_id,
            library_name="transformers" if self.is_full else "peft",
            pipeline_tag="text-generation",
            license=self.base.licence,
            tags=list(TAGS),
            model_name="sampler" if figures else None,
            eval_results=figures or None,
        ).to_yaml()

    def stated(self) -> dict[str, Any]:
        """Prompt, target and support as written."""
        terms = self.spec["target"]
        target = {} if terms is None else {"target": [_term(term) for term in terms]}
        return {"prompt": self.spec["prompt"], **target, "support": _settings(self.spec["support"])}

    def figures(self) -> list[dict[str, str]]:
        """How far each row is from the posterior, as lines of a table."""
        lines = [measured(report) for report in self.reports] or [drawn.figures() for drawn in self.drawn]
        return [{"row": str(i), **line} for i, line in enumerate(lines)]

    def functions(self) -> list[str]:
        """Functions that the target calls, except those of amortlm."""
        return list(dict.fromkeys(references(self.spec["target"])))

    def modules(self) -> list[str]:
        """The modules of these functions, which whoever loads the posterior has to trust."""
        return sorted({name.partition(":")[0] for name in self.functions()})


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("amortlm.card"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # Markdown: what is anybody's text goes through `cell` or `fenced`
    named = (markdown.as_yaml, markdown.cell, markdown.fenced, markdown.shortened, markdown.table, row_count)
    environment.filters |= {function.__name__: function for function in named} | {"json": json.dumps}
    return environment.get_template("card.md.jinja")


def write(folder: Path, card: Card, before: str | None = None) -> None:
    """Write a card into a folder, unless somebody has edited the one there. before: its text before this save, in which
    peft may have changed it."""
    if before is None or MARK in before or PEFT in before:
        write_text(folder / FILE, str(card))


def read(folder: Path) -> str | None:
    """The card in a folder, if there is one."""
    file = folder / FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def licence(file: str | Path | None) -> str | None:
    """The licence that a model's card names."""
    from huggingface_hub import ModelCard

    if file is None or not Path(file).is_file():
        return None
    try:
        found = ModelCard.load(file, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    """A term of a target without the weight that every term has."""
    return {k: v for k, v in term.items() if (k, v) != ("weight", 1.0)}


def _settings(support: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a support that are not at their defaults."""
    defaults = {f.name: f.default for f in fields(Support)}
    return {k: v for k, v in support.items() if v != defaults.get(k)}
