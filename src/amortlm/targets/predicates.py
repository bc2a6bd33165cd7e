"""Constraints that functions of users state, and constraints between the statements of a list."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amortlm.errors import RewardError
from amortlm.targets.base import Scoring
from amortlm.targets.functions import (
    Function,
    call,
    check_timeout,
    function_of,
    name_of,
    require_reference,
    shown,
    takes_row,
)
from amortlm.targets.texts import Constraint, TextConstraint, rows_of, state_statements
from amortlm.types import Row


class Predicate(TextConstraint):
    """`fn(text) -> bool`, or `fn(text, row) -> bool` when it takes two arguments.

    A function at the top level of a module is saved with a posterior by its name, "package.module:function"; `fn` may
    also be this name. timeout: seconds for one call (see `amortlm.targets.functions.call`). Scoring raises RewardError
    if the function raises an error, returns anything but True or False, or takes longer.
    """

    name = "predicate"  # in a spec

    def __init__(
        self,
        fn: Callable[..., bool] | Function | str,
        penalty: float | None = None,
        timeout: float | None = None,
    ):
        super().__init__(penalty)
        self.function, self.timeout = function_of(fn), check_timeout(timeout)
        self._wants_row = takes_row(self.function.call)

    def accepts(self, text: str, row: Row) -> bool:
        return self._says(text, row)

    def _says(self, given: str | list[str], row: Row) -> bool:
        """What the function says of a text or of statements. Raises RewardError."""
        arguments = (given, copy.deepcopy(dict(row))) if self._wants_row else (given,)
        what = f"{self!r}, called with {given!r},"
        got = call(self.function.call, *arguments, timeout=self.timeout, what=what)
        if str(getattr(got, "dtype", "")) in ("bool", "torch.bool") and math.prod(got.shape) == 1:
            return bool(got)  # a truth value of numpy or torch
        if isinstance(got, bool):
            return got
        raise RewardError(
            f"{what} returned {shown(got)}; return True or False (for a regex match: `is not None`)"
        )

    def settings(self) -> tuple[str, Any]:
        reference = require_reference(self.function)
        timeout = {} if self.timeout is None else {"timeout": self.timeout}
        return self.name, {"function": reference, **timeout} if timeout else reference

    def __repr__(self) -> str:
        return f"{self.name}({self.function.reference or name_of(self.function.call)})"


class _StatementConstraint(Constraint):
    """A constraint on the texts of a list's statements, at every stopping state: the list as it is there.

    What is said of a list with an unfinished last statement is said of the list that ends there, so a fault that no
    later token mends has R = 0 from its first stopping state on.
    """

    statements = 1

    @abstractmethod
    def allows(self, statements: list[str], row: Row) -> bool: ...

    def holds(self, scoring: Scoring) -> Tensor:
        rows, decode = rows_of(scoring.rollouts), self.bound_lm.decode
        ok = [
            [found is not None and self.allows([decode(s) for s in found], row) for found in line]
            for line, row in zip(state_statements(scoring.rollouts), rows, strict=True)
        ]
        return torch.tensor(ok, device=scoring.rollouts.tokens.device)


class Distinct(_StatementConstraint):
    """No two statements of a list have the same text, outer white space removed."""

    def allows(self, statements: list[str], row: Row) -> bool:
        return len({text.strip() for text in statements}) == len(statements)

    def settings(self) -> tuple[str, Any]:
        return "distinct", True


class Relation(_StatementConstraint, Predicate):
    """`fn(statements) -> bool`, or `fn(statements, row) -> bool`: a predicate of the statements of a list.

    statements: their texts, in order, each with its leading space. A list has as many as the support asks for, or more,
    so fn may index as many as `min_statements`. Names, timeout and errors are those of `Predicate`.
    """

    name = "relation"

    def allows(self, statements: list[str], row: Row) -> bool:
        return self._says(statements, row)
