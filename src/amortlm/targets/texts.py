"""What terms that read the text or the statements of a completion have in common."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError, SupportError
from amortlm.support.lists import split_statements
from amortlm.support.spec import Support
from amortlm.targets.base import Scoring, Target
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.text.codec import Codec

Decode = Callable[[Sequence[int]], str]


def state_texts(scoring: Scoring, decode: Decode) -> list[list[str | None]]:
    """[B][T+1] the text of z_1:t at every stopping state, None at other states; decoded once per batch."""

    def build() -> list[list[str | None]]:
        cache: dict[tuple[int, ...], str] = {}
        out = []
        masks = scoring.rollouts.stop_mask.tolist()
        for tokens, mask in zip(scoring.rollouts.tokens.tolist(), masks, strict=True):
            texts: list[str | None] = []
            for t, allowed in enumerate(mask):
                prefix = tuple(tokens[:t])
                if allowed and prefix not in cache:
                    cache[prefix] = decode(prefix)
                texts.append(cache[prefix] if allowed else None)
            out.append(texts)
        return out

    return scoring.memo(("texts", decode), build)


def state_statements(rollouts: Rollouts) -> list[list[list[list[int]] | None]]:
    """[B][T+1] the statements (token lists) of z_1:t at every stopping state, None at other states. Raises SupportError
    if completions are not lists."""
    if rollouts.separator is None:
        raise SupportError("statements are those of lists: give the support a separator=")
    masks = rollouts.stop_mask.tolist()
    return [
        [split_statements(z[:t], rollouts.separator) if stops else None for t, stops in enumerate(mask)]
        for z, mask in zip(rollouts.tokens.tolist(), masks, strict=True)
    ]


def rows_of(rollouts: Rollouts) -> list[Row]:
    return [rollouts.rows[i] for i in rollouts.row_index.tolist()]


class TextTerm(Target):
    """A term that reads text or tokens. It gets the model's tokenizer when the target is bound."""

    def bind(self, lm: Codec) -> Target:
        bound = copy.copy(self)
        bound.lm = lm
        return bound

    @property
    def bound_lm(self) -> Codec:
        if self.lm is None:
            raise ConfigError(
                f"{self!r} does not know the tokenizer yet: call target.bind(lm) before score()"
            )
        return self.lm


class Constraint(TextTerm):
    """Base of all constraints: log R is 0 if it holds, -penalty (nats; default: -inf, hard) if it fails.

    Raises RewardError for a penalty that is not a positive number.
    """

    def __init__(self, penalty: float | None = None):
        if penalty is not None and not (penalty > 0 and math.isfinite(penalty)):
            raise RewardError(
                f"a penalty is a positive number of nats, or None for a hard constraint; got {penalty}"
            )
        self.penalty, self.hard = penalty, penalty is None

    @abstractmethod
    def holds(self, scoring: Scoring) -> Tensor:
        """[B, T+1] bool: does z_1:t satisfy the constraint? Entries outside `stop_mask` are ignored."""

    @abstractmethod
    def settings(self) -> tuple[str, Any]:
        """(name, arguments) of the term in a spec."""

    def narrowed(self, support: Support, allowed: Sequence[int]) -> Support | None:
        """The support without what the constraint rejects; None if a support cannot state that.

        allowed: the ids of the tokens that the support allows."""
        return None

    def score_batch(self, scoring: Scoring) -> Tensor:
        ok = self.holds(scoring)
        fail = -math.inf if self.penalty is None else -self.penalty
        return torch.zeros(ok.shape, device=ok.device).masked_fill(~ok, fail)

    def to_spec(self) -> list[dict[str, Any]]:
        name, arguments = self.settings()
        return [{name: arguments} if self.penalty is None else {name: arguments, "penalty": self.penalty}]

    def __repr__(self) -> str:
        name, arguments = self.settings()
        return f"{name}({arguments!r})"


class TextConstraint(Constraint):
    @abstractmethod
    def accepts(self, text: str, row: Row) -> bool: ...

    def holds(self, scoring: Scoring) -> Tensor:
        rows = rows_of(scoring.rollouts)
        texts = state_texts(scoring, self.bound_lm.decode)
        ok = [
            [text is not None and self.accepts(text, row) for text in line]
            for line, row in zip(texts, rows, strict=True)
        ]
        return torch.tensor(ok, device=scoring.rollouts.tokens.device)
