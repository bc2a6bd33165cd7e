"""log p of texts that mention single statements of a list: programs of several language variables.

    lm.log_prob("{z1}.", given="{x}") + lm.log_prob("{z2}.", given="{x}{z1} and") + lm.log_prob("{y}", given="A{z1}.")

is p(z1 . | x) p(z2 . | x z1 and) p(y | A z1 .): a variable is a statement of one list, and stands in any of the terms.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.engine.passes import gather_log_probs
from amortlm.engine.prefix import pad_right
from amortlm.errors import TemplateError
from amortlm.targets.base import Scoring, Target
from amortlm.targets.lm import LogProb
from amortlm.targets.texts import state_statements
from amortlm.text.template import Messages, PromptTemplate, Template
from amortlm.types import Row

if TYPE_CHECKING:
    from amortlm.engine.model import CausalLM

Statements = tuple[tuple[int, ...], ...]
Part = tuple[list[int] | int, bool]  # (tokens, or the number of a statement; is it scored?)


def log_prob(lm: CausalLM, of: str, given: str | Messages = "") -> LogProb | StatementLogProb:
    """The term of these templates; see `amortlm.LanguageModel.log_prob`. Raises TemplateError."""
    templates = [Template(of), *PromptTemplate(given).templates]
    kind = StatementLogProb if any(t.numbers for t in templates) else LogProb
    return kind(lm, of, given)


class StatementLogProb(Target):
    """log p(of | given) of templates in which `{z1}`, `{z2}`, .. are statements of a list, in any order, each as often
    as needed.

    A statement stands in the text as its tokens, without separator or stop symbol, so what ends it is written in the
    template, and scored there: `"{z1}."`. The text between is tokenised by itself, and `given` and `of` apart. At every
    stopping state the statements are those of the list that ends there, so every prefix has a score; a support has at
    least as many statements as the term mentions. Equal texts of a batch are scored once.

    Raises TemplateError if `of` ends with a statement (nothing would say where it ends, and its probability would be
    that of all texts that begin like it), and if no text stands between two statements.
    """

    has_suffix = True  # a state takes a pass of its own
    lm: CausalLM

    def __init__(self, lm: CausalLM, of: str, given: str | Messages = ""):
        self.lm, self.of, self.given = lm, Template(of), PromptTemplate(given)
        mentioned = [*chain.from_iterable(t.numbers for t in self.given.templates), *self.of.numbers]
        latents = sum(len(t.latents) for t in (self.of, *self.given.templates))
        if not mentioned or len(mentioned) < latents:
            raise TemplateError(
                f"{self!r}: mention statements one by one, {{z1}}, {{z2}}, .., with the text around each; {{z}} and "
                "latents in sequence, {z1}{z2}, stand alone in their term"
            )
        if self.of.parts[-1][1] in self.of.latents:
            last = self.of.latents[-1]
            raise TemplateError(
                f"{self!r}: write what ends the statement, as in `of`={of + '.'!r} for {{{last}}}"
            )
        if self._touches():
            raise TemplateError(
                f"{self!r}: write the text between the statements where `given` and `of` meet"
            )
        self.statements, self._numbers = max(mentioned), sorted(set(mentioned))
        self.columns = frozenset(self.of.columns | self.given.columns)

    def _touches(self) -> bool:
        before, after = self.given.templates[-1], self.of.parts[0]
        ends = bool(before.parts) and before.parts[-1][1] in before.latents
        return ends and after[1] in self.of.latents and not after[0]

    def __repr__(self) -> str:
        return f"log p({self.of.text!r} | {self.given.source!r})"

    def to_spec(self) -> list[dict[str, Any]]:
        return [{"log_prob": {"of": self.of.text, "given": self.given.source}}]

    def parts(self, row: Row) -> tuple[list[int], list[Part]]:
        """The text of a row, its statements left open: its first tokens, which are not scored, and the rest."""
        if any(t.has_latent for t in self.given.templates):
            first, *rest = self.given.templates[0].script(row)
            assert isinstance(first, str)
            start = self.lm.encode_start(first)
        else:
            start, rest = self.lm.encode_prompt(self.given, row), []
        out: list[Part] = []
        for texts, scored in ((rest, False), (self.of.script(row), True)):
            out += [(x if isinstance(x, int) else self.lm.encode_continuation(x), scored) for x in texts]
        return start, out

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        row, states = rollouts.row_index.tolist(), state_statements(rollouts)
        place: dict[tuple[int, Statements], int] = {}
        at = [
            (b, t, place.setdefault((row[b], self._mentioned(found)), len(place)))
            for b, line in enumerate(states)
            for t, found in enumerate(line)
            if found is not None
        ]
        out = torch.zeros(rollouts.stop_mask.shape, device=self.lm.device)
        if at:
            b, t, i = torch.tensor(at, device=out.device).unbind(1)
            out[b, t] = self._scores(rollouts.rows, list(place))[i]
        return out

    def _mentioned(self, statements: list[list[int]]) -> Statements:
        return tuple(tuple(statements[n - 1]) for n in self._numbers)

    def _scores(self, rows: Any, texts: list[tuple[int, Statements]]) -> Tensor:
        """[M] log p of the text of each (row, mentioned statements), nats."""
        lm, parts = self.lm, [self.parts(row) for row in rows]
        prompts = [start for start, _ in parts]
        index = torch.tensor([row for row, _ in texts], device=lm.device)
        filled = [self._filled(parts[row][1], statements) for row, statements in texts]
        tokens, lengths = pad_right([ids for ids, _ in filled], lm.device)
        scored = pad_right([marks for _, marks in filled], lm.device)[0].bool()
        longest = max(len(p) for p in prompts)
        lm.check_context(longest, longest + tokens.shape[1], f"{self!r} with its statements")
        out = torch.zeros(len(texts), device=lm.device)
        for block in lm.passes.blocks(prompts):
            prefix = lm.passes.encode(prompts[block])
            mine = ((index >= block.start) & (index < block.stop)).nonzero().squeeze(1)
            for group in lm.passes.groups(prefix, lengths[mine]):
                one = mine[group]
                text = tokens[one, : int(lengths[one].max())]
                logits = lm.passes.state_logits(prefix, index[one] - block.start, text[:, :-1])
                log_p = gather_log_probs(logits, text)
                out[one] = torch.where(scored[one, : text.shape[1]], log_p, 0.0).sum(1)
        return out

    def _filled(self, parts: list[Part], statements: Statements) -> tuple[list[int], list[int]]:
        """(tokens, 1 for each that is scored) of the text after its first part."""
        known = dict(zip(self._numbers, statements, strict=True))
        runs = [(known[x] if isinstance(x, int) else x, scored) for x, scored in parts]
        return [i for ids, _ in runs for i in ids], [int(scored) for ids, scored in runs for _ in ids]
