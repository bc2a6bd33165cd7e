"""Text templates over data columns and the latent `{z}`, and their tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from amortlm.errors import DataError, TemplateError, nearest
from amortlm.types import Row

LATENT = "z"
NUMBERED = re.compile(r"z\d+")
Messages = Sequence[Mapping[str, str]]


class Template:
    """`"Beginning: {x}\\nMiddle:{z}"`: literal text with `{column}` placeholders; `{{` is a brace.

    `{z1}{z2}` is `{z}` as a list of exactly two statements: latents in sequence, the support's separator between them.

    Raises TemplateError for unbalanced braces, empty or formatted placeholders, a repeated `{z}`, or `{z1}`, `{z2}`,
    ... that do not follow each other.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as e:
            raise TemplateError(f"template {text!r}: {e}; write {{{{ for a literal brace") from None
        self.parts: list[tuple[str, str | None]] = []
        for literal, field, spec, conversion in parsed:
            if field is not None and (not field.isidentifier() or spec or conversion):
                raise TemplateError(
                    f"template {text!r}: {{{field}}} is not a plain column name; write {{name}} without format or "
                    "conversion, and {{ for a literal brace"
                )
            self.parts.append((literal, field))
        if self.fields.count(LATENT) > 1:
            raise TemplateError(f"template {text!r}: {{z}} may appear only once")
        self._check_numbered()

    @property
    def fields(self) -> list[str]:
        return [field for _, field in self.parts if field is not None]

    @property
    def latents(self) -> list[str]:
        """`["z"]`, or `["z1", "z2", ..]`, or none."""
        return [field for field in self.fields if field == LATENT or NUMBERED.fullmatch(field)]

    @property
    def columns(self) -> set[str]:
        return set(self.fields) - set(self.latents)

    @property
    def has_latent(self) -> bool:
        return bool(self.latents)

    def _check_numbered(self) -> None:
        latents = self.latents
        if latents in ([], [LATENT]):
            return
        first = self.fields.index(latents[0])
        run = self.parts[first : first + len(latents)]
        expected = [f"z{i}" for i in range(1, len(latents) + 1)]
        if len(latents) == 1 or [f for _, f in run] != expected or any(text for text, _ in run[1:]):
            raise TemplateError(
                f"template {self.text!r}: write latents in sequence as {{z1}}{{z2}}, in order and with nothing "
                "between (the support's separator stands there), or one latent as {z}"
            )

    @property
    def around(self) -> tuple[str, str]:
        """The template before and after the latent: not filled in."""
        first, last = (f"{{{name}}}" for name in (self.latents[0], self.latents[-1]))
        return self.text.split(first, 1)[0], self.text.split(last, 1)[1]

    def split(self, row: Row) -> tuple[str, str]:
        """The filled-in text before and after the latent (all of it before, without one)."""
        before: list[str] = []
        after: list[str] = []
        out = before
        latents = self.latents
        for literal, field in self.parts:
            out.append(literal)
            if field in latents:
                out = after
            elif field is not None:
                out.append(self._value(row, field))
        return "".join(before), "".join(after)

    def _value(self, row: Row, column: str) -> str:
        if column not in row:
            raise TemplateError(
                f"template {self.text!r} uses {{{column}}}, but the data has no such column; "
                + nearest(column, [*map(str, row), LATENT])
            )
        if row[column] is None:
            raise DataError(f"column {column!r} is empty (None) in a row; drop or fill such rows")
        return str(row[column])


class PromptTemplate:
    """What comes before the latent: a text template, or chat messages with templates as contents.

    Messages go through the tokenizer's chat template with the generation prompt added.
    """

    def __init__(self, prompt: str | Messages):
        self.source = prompt
        if isinstance(prompt, str):
            self.templates = [Template(prompt)]
            self.roles: list[dict[str, Any]] | None = None
        else:
            self.templates = [Template(m["content"]) for m in prompt]
            self.roles = [{k: v for k, v in m.items() if k != "content"} for m in prompt]
            if any(t.has_latent for t in self.templates):
                raise TemplateError("{z} cannot be inside chat messages: it follows them")

    @property
    def columns(self) -> set[str]:
        return set().union(*(t.columns for t in self.templates))

    def messages(self, row: Row) -> list[dict[str, Any]] | None:
        """The filled-in messages, or None for a text prompt."""
        if self.roles is None:
            return None
        return [{**r, "content": t.split(row)[0]} for r, t in zip(self.roles, self.templates, strict=True)]
