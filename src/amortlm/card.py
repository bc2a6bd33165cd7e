"""The model card of a saved posterior: README.md, with the metadata that the hub reads.

Texts of rows, targets and samples are data of a user: they stand in code blocks whose fence is longer than any in the
text, or in table cells where every mark of Markdown and HTML is a character reference.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amortlm.engine.adapter import FULL
from amortlm.files import write_text
from amortlm.language_model import EMBEDDED, EMBEDDED_PATH
from amortlm.saved import hub_id
from amortlm.support.spec import Support
from amortlm.targets.functions import references
from amortlm.types import Row

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from amortlm.engine.model import CausalLM

FILE = "README.md"
MARK = "<!-- Written by amortlm, and written again by the next save. Delete this line to keep your edits. -->"
PEFT = "# Model Card for Model ID"  # the card that peft writes
PLACE = '"user/name"'  # stands for the repository in the code of a card
ROWS, SAMPLES, DRAWS = 4, 4, 64  # of a card: rows, samples shown of each, draws behind its figures
LONGEST = 500  # characters of a value, and of a sample
TAGS = ("amortlm", "gflownet", "posterior-sampling", "amortized-inference")
PAPER = "[Hu et al. 2024](https://arxiv.org/abs/2310.04363)"
SAFE = re.compile(r"[\w ,.'()?-]")
METRICS = (  # of the model index: figure of a row, its name, whether a larger value is worse
    ("tv_high", "total variation to the posterior, worst row, at most", True),
    ("gap", "min(KL(q||p), KL(p||q)) in nats, worst row, at most", True),
    ("ess", "effective sample size as a share, worst row", False),
)


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
        if self.hub_id:
            return f"[{cell(self.hub_id)}](https://hf.co/{self.hub_id})"
        if self.name:
            return f"`{self.name}`, the language model that ships with amortlm ({cell(self.about)})"
        return f"a language model that is not on the hub ({cell(self.about)})"


def base_of(lm: CausalLM) -> Base:
    """The base model of a posterior; nothing is downloaded."""
    parameters = sum(p.numel() for p in lm.model.parameters())
    size = f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
    about = f"{lm.model.config.model_type}, {size} parameters"
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


@dataclass(frozen=True)
class Card:
    """Everything that a card says.

    spec         the content of posterior.json
    columns      the columns of prompt and target
    stated       the target in words, for a target without a JSON form
    rows         those of which samples are shown
    drawn        draws of each of them
    reports      the diagnosis of these rows, and maybe of more (`RowDiagnosis.to_dict`); without one, figures of the
                 draws are shown
    certificate  (name, sha256) of the certificate's file, if it is about these weights
    """

    spec: Mapping[str, Any]
    base: Base
    columns: Sequence[str]
    stated: str
    rows: Sequence[Row] = ()
    drawn: Sequence[Drawn] = ()
    reports: Sequence[Mapping[str, Any]] = ()
    certificate: tuple[str, str] | None = None
    tags: Sequence[str] = field(default=TAGS)

    @property
    def is_full(self) -> bool:
        return self.spec["weights"] == FULL

    def __str__(self) -> str:
        parts = [
            self._title(),
            self._stated(),
            self._figures(),
            self._samples(),
            self._loading(),
            self._limits(),
        ]
        return f"---\n{self._metadata()}\n---\n\n{MARK}\n\n" + "\n\n".join(filter(None, parts)) + "\n"

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        results = _results(self.reports)
        return ModelCardData(
            base_model=self.base.hub_id,
            library_name="transformers" if self.is_full else "peft",
            pipeline_tag="text-generation",
            license=self.base.licence,
            tags=list(self.tags),
            model_name="sampler" if results else None,
            eval_results=results or None,
        ).to_yaml()

    def _title(self) -> str:
        kind = "A full copy" if self.is_full else "A LoRA adapter"
        return (
            "# A sampler of a posterior\n\n"
            f"{kind} of {self.base}, fine-tuned with amortlm (GFlowNet objectives, {PAPER}). Given a row of data, it "
            "writes a completion z with probability q(z) in one left-to-right pass; it was trained so that q is the "
            "posterior p(z) = R(z) / Z stated here."
        )

    def _stated(self) -> str:
        spec, target = self.spec, self.spec["target"]
        shown = {"prompt": spec["prompt"], "target": None if target is None else [_term(t) for t in target]}
        shown["support"] = _settings(spec["support"])
        if target is None:
            del shown["target"]
        text = "## What it samples from\n\n" + fenced(as_yaml(shown), "yaml")
        if target is None:
            text += f"\n\nTarget: {cell(self.stated)}. It is not saved with the weights."
        return (
            f"{text}\n\n`target`: log R(z), the sum of these terms, in nats; `log_prob` is the log-probability that "
            "the base model gives to `of` after `given`. `{z}` is the completion with its stop symbol, other names in "
            "braces are columns of a row. `support`: the completions that can be written; q is renormalised on them. "
            "`prompt`: what the sampler reads."
        )

    def _figures(self) -> str:
        if not self.rows:
            return ""
        lines = [_measured(r) for r in self.reports] or [_estimated(d) for d in self.drawn]
        lines = [{"row": str(i), **line} for i, line in enumerate(lines)]
        legend = DIAGNOSED if self.reports else ESTIMATED.format(n=self.drawn[0].n)
        text = f"## How far it is from the posterior\n\n{table(lines)}\n\n{legend}"
        if self.certificate:
            name, hashed = self.certificate
            text += f"\n\nCertificate: `{name}`, sha256 `{hashed}`. It states the gap (the smaller KL), and "
            text += f"`{CHECK}` measures it again."
        return text

    def _samples(self) -> str:
        parts = []
        for i, (row, drawn) in enumerate(zip(self.rows, self.drawn, strict=True)):
            lines = [
                {"completion": cell(text), "log q": f"{log_q:.2f}"}
                | ({} if weight is None else {"weight": f"{weight:.2f}"})
                for text, log_q, weight in drawn.shown
            ]
            parts.append(
                f"Row {i}:\n\n{fenced(as_yaml(shortened(row), flow=False), 'yaml')}\n\n{table(lines)}"
            )
        if not parts:
            return ""
        weighed = self.drawn[0].log_z is not None
        legend = "\n\nCompletions are shown with their stop symbol. log q: nats." + (
            " weight: R/q over its mean; 1 where q = p." if weighed else ""
        )
        return "## Samples\n\n" + "\n\n".join(parts) + legend

    def _loading(self) -> str:
        row = ", ".join(f'{json.dumps(name)}: "..."' for name in sorted(self.columns))
        model = "" if self.base.name else ', lm="the base model"'
        code = (
            "from amortlm import Posterior\n"
            f"posterior = Posterior.from_pretrained({PLACE}{model}{self._trust()})\n"
            f"print([s.text for s in posterior.sample({{{row}}}, 4)])"
        )
        return f"## How to load it\n\n{fenced(code, 'python')}"

    def _trust(self) -> str:
        modules = sorted({name.partition(":")[0] for name in self._functions()})
        return f", trust={json.dumps(modules)}" if modules else ""

    def _functions(self) -> list[str]:
        """Functions that the target calls, except those of amortlm."""
        return list(dict.fromkeys(references(self.spec["target"])))

    def _limits(self) -> str:
        trained = "It was trained for prompts of this form only. For rows unlike those it was trained on, it may be no "
        lines = [trained + "better than the base model."]
        if self.rows:
            lines.append(
                f"The figures are about {_count(len(self.reports or self.rows))}, and say nothing about others."
            )
        if functions := self._functions():
            names = ", ".join(map(cell, functions))
            lines.append(
                f"The target calls {names}, which is not in this repository: install it, and trust its module."
            )
        if not self.base.name:
            lines.append("The base model is not public: without it the weights are of no use.")
        lines.append(f"It has the biases of the base model. It was saved by amortlm {version('amortlm')}.")
        return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{self._elsewhere()}"

    def _elsewhere(self) -> str:
        lost = (
            "But the support (stop symbols, lengths, allowed tokens, pattern, renormalisation) is lost there, so what "
            "is drawn does not have the distribution above."
        )
        base = json.dumps(self.base.hub_id) if self.base.hub_id else '"the base model"'
        before = ""
        if self.base.name and not self.base.hub_id:
            before, base = "from amortlm.language_model import EMBEDDED_PATH\n", "EMBEDDED_PATH"
        if self.is_full:
            code = (
                "from transformers import AutoModelForCausalLM\n"
                f"model = AutoModelForCausalLM.from_pretrained({PLACE})"
            )
            return f"The weights also load in plain `transformers`. {lost}\n\n{fenced(code, 'python')}"
        code = (
            f"from peft import PeftModel\n{before}from transformers import AutoModelForCausalLM\n"
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {PLACE})"
        )
        return f"The adapter also loads in plain `peft`. {lost}\n\n{fenced(code, 'python')}"


CHECK = "amortlm evaluate user/name --check"
DIAGNOSED = (
    "The rows are under Samples, the first four of them. Verdict: `trust it`, the samples may be used as they are; "
    '`use with correction`, with `posterior.sample(row, n, correct="sir")` (or `"mh"`); `do not use`, nothing was '
    "shown to hold. off by: total variation between q and p, the share of the probability in the wrong place. KL, "
    "log Z: nats; exact, or an interval. ESS: effective share of the draws of q, 100 % where q = p."
)
ESTIMATED = (
    "From {n} draws of q for each row (see Samples), which cannot show a mode of p that q never visits: an estimate, "
    "not a verdict (`amortlm evaluate` gives one). ESS: effective share of the draws, 100 % where q = p; log Z: nats."
)


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


def as_yaml(value: Any, flow: bool | None = None) -> str:
    """flow: may mappings stand in braces? By default those without further ones."""
    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)


def shortened(row: Row) -> dict[str, Any]:
    return {k: _short(v) if isinstance(v, str) else v for k, v in row.items()}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [..]"


def fenced(text: str, language: str) -> str:
    """A code block with a fence that the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """A text in a table or sentence, where it is shown as it is: no Markdown, HTML, link or line break in it acts."""
    shown = "".join(_reference(c) for c in _short(text))
    return re.sub(r"www\.", lambda found: found[0].replace(".", "&#46;"), shown, flags=re.IGNORECASE)


def _reference(character: str) -> str:
    if character == "\n":
        return "↵"
    if not character.isprintable():
        return f"&#92;x{ord(character):02x}"
    return (
        character
        if character.isascii() and SAFE.match(character) and character != "_"
        else (f"&#{ord(character)};" if character.isascii() else character)
    )


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of lines with the same keys."""
    head = list(lines[0])
    rows = [head, ["---"] * len(head), *([line[name] for name in head] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(report: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table of verdicts. report: infinite figures may be None, as in JSON."""
    is_exact = "total_variation" in report
    off, correct = report["tv_high"], report.get("correct")
    unknown = report["gap"] is None or math.isinf(report["gap"])
    return {
        "verdict": report["verdict"] + (f" ({correct})" if correct else ""),
        "off by": "?" if unknown and not is_exact else ("" if is_exact else "at most ") + _percent(off),
        "KL(q‖p)": _interval(report, "kl_qp", "kl_qp"),
        "KL(p‖q)": _interval(report, "kl_pq", "kl_pq"),
        "log Z": _interval(report, "log_z", "exact_log_z"),
        "ESS": _percent(report["ess"]),
    }


def _estimated(drawn: Drawn) -> dict[str, str]:
    if drawn.ess is None or drawn.log_z is None:
        return {"draws": str(drawn.n)}
    return {"ESS": _percent(drawn.ess), "log Z": _number(drawn.log_z)}


def _interval(report: Mapping[str, Any], name: str, exact: str) -> str:
    if "total_variation" in report:
        known = report[exact]
        return "∞" if known is None or math.isinf(known) else _number(known)
    low, high = (_number(report[f"{name}_{end}"]) for end in ("low", "high"))
    return "?" if low == high == "?" else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _number(x: float | None) -> str:
    return "?" if x is None or not math.isfinite(x) else "0" if abs(x) < 1e-6 else f"{x:.3g}"


def _count(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"


def _results(reports: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The figures for the model index: those that every row has."""
    from huggingface_hub import EvalResult

    found = []
    for name, words, worst_is_high in METRICS:
        values = [report.get(name) for report in reports]
        known = [v for v in values if v is not None and math.isfinite(v)]
        if known and len(known) == len(values):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="rows",
                    dataset_name=_count(len(values)),
                    metric_type=name,
                    metric_name=words,
                    metric_value=float(f"{(max if worst_is_high else min)(known):.4g}"),
                )
            )
    return found
