"""Text templates over data columns and the latent `{z}`, and their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time, timedelta
from itertools import pairwise
from numbers import Number
from pathlib import PurePath
from string import Formatter
from typing import Any
from uuid import UUID

import numpy as np

from amortlm.errors import DataError, TemplateError, nearest
from amortlm.types import Row

LATENT = "z"
NUMBERED = re.compile(r"z\d+")
Messages = Sequence[Mapping[str, Any]]
ROLE = re.compile(r"[A-Za-z][\w-]*")
Pieces = Sequence[tuple[str, bool]]  # a text in parts: (part, whether it comes from the data)
PLAIN = (
    str,
    Number,
    date,
    time,
    timedelta,
    PurePath,
    UUID,
)  # types whose str() is the text that a reader expects


class Template:
    """`"Beginning: {x}\\nMiddle:{z}"`: literal text with `{column}` placeholders; `{{` is a literal brace.

    `{z1}{z2}` is `{z}` as a list of exactly two statements (latents in sequence), with the support's separator between
    them. Otherwise `{z2}` is the second statement of a list by itself, wherever and as often as the template has it: no
    separator or stop symbol comes with it, so text of the template stands between two statements.

    Raises TemplateError for unbalanced braces, empty or formatted placeholders, a repeated `{z}`, `{z}` beside numbered
    latents, or numbered latents next to each other that are not all of `{z1}{z2}..` once and in order.
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
    def in_sequence(self) -> bool:
        """Are the latents `{z1}{z2}..`, all statements of a list without a gap?"""
        latents = self.latents
        if len(latents) < 2 or latents != [f"z{i}" for i in range(1, len(latents) + 1)]:
            return False
        first = self.fields.index("z1")
        run = self.parts[first : first + len(latents)]
        return [f for _, f in run] == latents and not any(text for text, _ in run[1:])

    @property
    def numbers(self) -> list[int]:
        """The statements that the template mentions one by one, in its order."""
        return (
            [] if self.latents == [LATENT] or self.in_sequence else [int(name[1:]) for name in self.latents]
        )

    @property
    def columns(self) -> set[str]:
        return set(self.fields) - set(self.latents)

    @property
    def has_latent(self) -> bool:
        return bool(self.latents)

    def _check_numbered(self) -> None:
        if self.latents in ([], [LATENT]) or self.in_sequence:
            return
        where = f"template {self.text!r}: "
        if LATENT in self.latents:
            raise TemplateError(where + "write {z}, the whole completion, or its statements {z1}, {z2}, ..")
        odd = [name for name in self.latents if name[1] == "0"]
        if odd:
            raise TemplateError(where + f"{{{odd[0]}}}: statements are counted from {{z1}}")
        pairs = pairwise(self.parts)
        if any(a in self.latents and b in self.latents and not text for (_, a), (text, b) in pairs):
            raise TemplateError(
                where
                + "write latents in sequence as {z1}{z2}, all of them, once and in order; or write the text "
                "that stands between two statements"
            )

    @property
    def around(self) -> tuple[str, str]:
        """The parts of the template before and after the latent, not filled in."""
        first, last = (f"{{{name}}}" for name in (self.latents[0], self.latents[-1]))
        return self.text.split(first, 1)[0], self.text.split(last, 1)[1]

    def split(self, row: Row) -> tuple[str, str]:
        """The filled-in text before and after the latent; without a latent, (all the text, "")."""
        before: list[str] = []
        after: list[str] = []
        out = before
        latents = self.latents
        for literal, field in self.parts:
            out.append(literal)
            if field in latents:
                out = after
            elif field is not None:
                out.append(cell_text(self._value(row, field), field))
        return "".join(before), "".join(after)

    def script(self, row: Row) -> list[str | int]:
        """The filled-in text in parts, with the number of a statement (from 1) where it stands."""
        out: list[str | int] = [""]
        for literal, field in self.parts:
            out[-1] += literal  # type: ignore[operator]  # the last part is a text
            if field in self.latents:
                out += [int(field[1:]), ""]
            elif field is not None:
                out[-1] += cell_text(self._value(row, field), field)  # type: ignore[operator]
        return out

    def pieces(self, row: Row) -> Pieces:
        """The filled-in text of a template without a latent, in parts."""
        out = []
        for literal, field in self.parts:
            out.append((literal, False))
            if field is not None:
                out.append((cell_text(self._value(row, field), field), True))
        return out

    @property
    def only_column(self) -> str | None:
        """The column of a template that consists of one column only, such as "{prompt}"; else None."""
        return self.parts[0][1] if len(self.parts) == 1 and self.parts[0][0] == "" and self.columns else None

    def _value(self, row: Row, column: str) -> Any:
        if column not in row:
            raise TemplateError(
                f"template {self.text!r} uses {{{column}}}, but the data has no such column; "
                + nearest(column, [*map(str, row), LATENT])
            )
        return row[column]


def cell_text(value: Any, column: str) -> str:
    """A cell as text, by `str`: texts, numbers, truth values, dates and times, paths.

    Raises DataError for a cell that is empty (None, NaN, NaT, pandas.NA), infinite, or of another type."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a single value of numpy or torch
        is_date = getattr(value.dtype, "kind", "") in ("M", "m")
        value = (None if value != value else str(value)) if is_date else value.item()
    if is_empty(value):
        raise DataError(f"column {column!r} is empty ({value}) in a row; drop or fill such rows")
    if is_messages(value):
        raise DataError(
            f"column {column!r} holds chat messages where a template needs text; only a prompt that is exactly "
            f'"{{{column}}}" takes messages. Elsewhere give a text, such as row[{column!r}][-1]["content"]'
        )
    if not isinstance(value, PLAIN):
        raise DataError(
            f"column {column!r} holds a {type(value).__name__}, not text; turn it into the text that the model should "
            "read (join a list, decode bytes)"
        )
    if isinstance(value, Number) and value in (float("inf"), -float("inf")):
        raise DataError(
            f"column {column!r} is infinite in a row; if it is meant as text, give text, or drop such rows"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"column {column!r} holds half a character (a lone surrogate) in {text[:40]!r}; "
            'read the data as UTF-8, or clean it with text.encode("utf-8", "replace").decode()'
        ) from None
    return text


def is_empty(value: Any) -> bool:
    """Is the value None, or its form in data frames: NaN, NaT, pandas.NA?"""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Number) and bool(value != value)


def is_messages(value: Any) -> bool:
    """Is the value a chat, a list of {"role": .., "content": ..}?"""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


class PromptTemplate:
    """The prompt before the latent: a text template, or chat messages with templates as contents (a text, or text
    parts as in `[{"type": "text", "text": "{x}"}]`).

    Messages go through the tokenizer's chat template. The generation prompt is added, or, if the last message is the
    assistant's, this message is continued. A text template that consists of one column only, `"{prompt}"`, uses the
    messages in that column, if there are any (the conversational format of TRL). Raises TemplateError for other values.
    """

    def __init__(self, prompt: str | Messages):
        if isinstance(prompt, Mapping):
            prompt = [prompt]
        self.source = prompt
        self.roles: list[dict[str, Any]] | None = None
        if isinstance(prompt, str):
            self.templates = [Template(prompt)]
            return
        if not is_messages(prompt):
            raise TemplateError(
                f'{prompt!r} is not a prompt: give a text, or messages such as {{"role": "user", "content": "{{x}}"}}'
            )
        self.templates = [Template(_content(m)) for m in prompt]
        self.roles = [{k: v for k, v in m.items() if k != "content"} for m in prompt]
        if any(t.has_latent for t in self.templates):
            raise TemplateError("{z} cannot be inside chat messages: the completion follows them")

    @property
    def columns(self) -> set[str]:
        return set().union(*(t.columns for t in self.templates))

    def messages(self, row: Row, join: Callable[[Pieces], str] | None = None) -> list[dict[str, Any]] | None:
        """The filled-in messages, or None for a text prompt. join: a function that joins the parts of a text."""
        join = join or (lambda pieces: "".join(text for text, _ in pieces))
        if self.roles is not None:
            return [
                {**r, "content": join(t.pieces(row))} for r, t in zip(self.roles, self.templates, strict=True)
            ]
        column = self.templates[0].only_column
        value: Any = None if column is None else row.get(column)
        value = value.tolist() if isinstance(value, np.ndarray) else value  # as data frames hold lists
        if column is None or not is_messages(value):
            return None
        return [_from_data(m, column, join) for m in value]


def _content(message: Mapping[str, Any]) -> str:
    """The text of all parts of a message. Raises TemplateError for a message without text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) > 0 and all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    raise TemplateError(
        f"message {dict(message)!r}: give its content as a text, or as parts of type 'text'; models that read images "
        "or call tools are not supported"
    )


def _from_data(message: Mapping[str, Any], column: str, join: Callable[[Pieces], str]) -> dict[str, Any]:
    """A message from the data. Its role must be a word, because the chat template uses it."""
    role = message["role"]
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise DataError(f"column {column!r}: {role!r} is not a role of a message; give a word such as 'user'")
    odd = sorted(str(k) for k, v in message.items() if k not in ("role", "content") and v is not None)
    if odd:
        raise DataError(
            f"column {column!r}: a message has {odd[0]!r}; only 'role' and 'content' are read: drop it"
        )
    try:
        text = cell_text(_content(message), column)
    except TemplateError as e:
        raise DataError(f"column {column!r}: {e}") from None
    return {"role": role, "content": join([(text, True)])}
