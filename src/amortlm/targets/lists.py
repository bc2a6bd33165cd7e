"""Targets over lists of statements: latents in sequence, and lists whose order does not matter.

A completion can be a list of statements, `s1 SEP s2 SEP s3`: see `separator` of `amortlm.Support`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain, permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.engine.prefix import pad_right
from amortlm.errors import ConfigError, SupportError
from amortlm.support.law import SupportLaw
from amortlm.support.lists import split_statements
from amortlm.targets.base import Scoring, Target
from amortlm.targets.lm import LogProb
from amortlm.types import Rollouts
from amortlm.weights import log_mean_exp

if TYPE_CHECKING:
    from amortlm.support.spec import SupportLaw
    from amortlm.text.codec import Codec

MAX_STATEMENTS = 5  # 120 orders
String = tuple[int, tuple[int, ...]]  # (row, tokens)


class Unordered(Target):
    """A distribution over sets of statements: R is the mean reward of all orders of the list.

        log R(z) = log 1/n! sum over orders o of exp(target(s_o(1) SEP .. s_o(n)))

    It has the same log Z as `target`. A prefix is treated as a list, even if its last statement is unfinished. The mean
    is exact: every distinct order is scored, up to 120 for five statements. Raises SupportError for more than
    `MAX_STATEMENTS`: no cheaper mean is exact. There the list without `Unordered` serves: R summed over the orders of a
    set is the same, so the set of a list's statements has the law it has here. Only log q of a set would be a sum.

    separator: the separator of the support (text or token id)
    """

    def __init__(self, target: Target, separator: str | int):
        self.target, self.separator = target, separator
        self.every_prefix, self.columns = target.every_prefix, target.columns
        self.has_suffix = target.has_suffix
        # With a constraint inside, a rejected list has no reward of other terms, so it needs the prior of `Softened`.
        self.normalised = all(t.normalised for _, t in target.terms)
        self.hard, self.lm = target.hard, target.lm

    def bind(self, lm: Codec) -> Target:
        bound = copy.copy(self)
        bound.target, bound.lm = self.target.bind(lm), lm
        return bound

    @property
    def separator_id(self) -> int:
        if self.lm is None:
            raise ConfigError(
                f"{self!r} does not know the tokenizer yet: call target.bind(lm) before score()"
            )
        return self.lm.token_id(self.separator)

    def to_spec(self) -> list[dict[str, Any]]:
        return [{"unordered": {"target": self.target.to_spec(), "separator": self.separator}}]

    def __repr__(self) -> str:
        return f"unordered({self.target!r})"

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts
        judged = rollouts if self.every_prefix else rollouts.final_only()
        out = torch.zeros(judged.stop_mask.shape)
        row, tokens = rollouts.row_index.tolist(), rollouts.tokens.tolist()
        states = judged.stop_mask.nonzero().tolist()
        orders = [[(row[b], z) for z in self._orders(tokens[b][:t])] for b, t in states]
        score = self._scores(rollouts, set(chain.from_iterable(orders)))
        for (b, t), strings in zip(states, orders, strict=True):
            out[b, t] = log_mean_exp(torch.stack([score[s] for s in strings]))
        return out

    def _orders(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """The distinct orders of a list. Their mean is the mean over all orders, also if statements are equal."""
        separator = self.separator_id
        statements = split_statements(tokens, separator)
        if len(statements) > MAX_STATEMENTS:
            raise SupportError(_too_many(len(statements)))
        return [
            tuple(chain.from_iterable([separator, *s] for s in order))[1:]
            for order in sorted(set(permutations(map(tuple, statements))))
        ]

    def _scores(self, rollouts: Rollouts, strings: set[String]) -> dict[String, Tensor]:
        """log R of each string under `target`, in one batch. A string that is a prefix of another is scored as a state
        of the longer one."""
        if not strings:
            return {}
        trajectories: list[String] = []
        place: dict[String, tuple[int, int]] = {}
        for row, z in sorted(strings, reverse=True):  # the strings that begin with z stand right before z
            last = trajectories[-1] if trajectories and self.every_prefix else None
            if last is None or last[0] != row or last[1][: len(z)] != z:
                trajectories.append((row, z))
            place[row, z] = (len(trajectories) - 1, len(z))
        tokens, lengths = pad_right([z for _, z in trajectories], rollouts.tokens.device)
        states = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        stop_mask = torch.zeros(len(tokens), len(states), dtype=torch.bool, device=tokens.device)
        b, t = torch.tensor(list(place.values()), device=tokens.device).unbind(1)
        stop_mask[b, t] = True
        batch = replace(
            rollouts,
            row_index=torch.tensor([row for row, _ in trajectories], device=tokens.device),
            tokens=tokens,
            lengths=lengths,
            stops=torch.full_like(lengths, rollouts.stop_ids[0]),
            stop_mask=stop_mask,
            action_mask=states[:-1] < lengths[:, None],
        )
        return dict(zip(place, self.target.score(batch)[b, t].cpu(), strict=True))


def check_statements(target: Target, support: SupportLaw) -> None:
    """Raise SupportError if the latents of `target` do not fit the statements of `support`'s completions."""
    lists = support.lists
    for _, term in target.terms:
        if isinstance(term, LogProb):
            k = max(len(t.latents) for t in (term.of, *term.given.templates))
            if k > 1 and (lists is None or (lists.minimum, lists.maximum) != (k, k)):
                raise SupportError(
                    f"{term!r} has {k} latents: its support needs separator= and exactly {k} statements, "
                    f"min_statements={k}, max_statements={k} (and room for them in max_tokens)"
                )
        if term.statements > (0 if lists is None else lists.minimum):
            raise SupportError(
                f"{term!r} reads statements of a list, up to number {term.statements}: its support needs separator= "
                f"and min_statements={term.statements}, or more"
            )
        if isinstance(term, Unordered):
            check_statements(term.target, support)
            if lists is None or term.separator_id != lists.separator:
                raise SupportError(
                    f"{term!r} has separator {term.separator!r}, but the support has another separator or none: give "
                    "both the same separator="
                )
            if lists.maximum > MAX_STATEMENTS:
                raise SupportError(_too_many(lists.maximum))


def _too_many(n: int) -> str:
    return (
        f"Unordered scores all orders of a list of up to {MAX_STATEMENTS} statements, but the support allows {n}: "
        "lower its max_statements, or leave Unordered out and read the statements of a sample as a set, which has the "
        "same law if no other term depends on their order"
    )
