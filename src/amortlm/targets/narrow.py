"""Hard constraints of a target as a part of the support: the same posterior, and no completion is wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amortlm.errors import SupportError
from amortlm.support.patterns import pattern_automaton
from amortlm.support.spec import Support
from amortlm.support.spelling import UnsuitableError
from amortlm.targets.base import Target
from amortlm.targets.texts import Constraint

if TYPE_CHECKING:
    from amortlm.text.codec import Codec


def narrow(support: Support, target: Target, lm: Codec) -> tuple[Support, list[str]]:
    """(the support without the completions that hard constraints of the target reject, a sentence on each of these).

    What is left has the same rewards, so that the posterior is the same. `contains`, `matches`, `allowed_tokens` and
    `length` can narrow a support, each by itself or several together; a constraint that a support cannot state, or only
    in tables that are too large, is left to the target. Raises SupportError if nothing satisfies the constraints.
    """
    said = []
    for weight, term in target.bind(lm).terms:
        if not (isinstance(term, Constraint) and term.hard and weight > 0):
            continue
        try:
            support = _narrowed(support, term, lm)
            said.append(f"the support holds only what satisfies {term!r}")
        except UnsuitableError as e:
            said.append(f"{term!r} stays a term of the target alone: {e.reason}")
        except SupportError as e:
            raise SupportError(f"{term!r} in this support: {e}") from e
    return support, said


def _narrowed(support: Support, term: Constraint, lm: Codec) -> Support:
    """Raises UnsuitableError where the narrower support would not be exact, SupportError where it is empty."""
    if support.tool is not None:
        raise UnsuitableError("a tool writes into the completions", "take out the tool")
    law = support.bind(lm)
    found = term.narrowed(support, law.allowed.nonzero().squeeze(1).tolist())
    if found is None:
        raise UnsuitableError("a support cannot state it", "state a regular expression")
    for patterns in {support.patterns, found.patterns} - {()}:  # neither leaves out parts of characters
        pattern_automaton(patterns, lm, law.allowed, found.min_tokens, found.max_tokens, strict=True)
    found.bind(lm)
    return found
