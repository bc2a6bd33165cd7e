"""Supports whose completions match a regular expression: constrained decoding, for q in training and in sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amortlm.errors import MissingExtraError, SupportError
from amortlm.policy.automaton import Automaton

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

BROKEN = "\ufffd"  # what part of a character decodes to


def pattern_automaton(
    pattern: str, lm: LanguageModel, allowed: Tensor, min_tokens: int, max_tokens: int
) -> Automaton:
    """The automaton over tokens of `allowed` [V] whose texts, outer white space removed, match the pattern.

    Tokens that are a part of a character are never written. Raises MissingExtraError, and SupportError for a pattern
    that is not regular or matches nothing of min_tokens to max_tokens such tokens.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as e:
        raise MissingExtraError(
            "a support's pattern needs outlines-core: pip install 'amortlm[patterns]'"
        ) from e
    texts = _texts(lm, allowed)
    ids: dict[str, list[int]] = {}
    for token, text in texts.items():
        ids.setdefault(text, []).append(token)
    # The library wants an end symbol that is no token of the text.
    vocabulary = Vocabulary(len(allowed), ids)
    try:
        found = Index(rf"\s*(?:{pattern})\s*", vocabulary)
    except ValueError as e:
        raise SupportError(
            f"pattern {pattern!r}: {e}. A pattern is a regular expression without look-around and back-references"
        ) from None
    transitions = found.get_transitions()
    start, finals = found.get_initial_state(), found.get_final_states()
    number = {start: 0}
    for state in transitions | dict.fromkeys(finals):
        number.setdefault(state, len(number))
    step = torch.full((len(number), len(allowed)), len(number))
    for state, moves in transitions.items():
        moves = {token: number[after] for token, after in moves.items() if token < len(allowed)}
        step[number[state], list(moves)] = torch.tensor(list(moves.values()), dtype=torch.long)
    accepts = torch.zeros(len(number), dtype=torch.bool)
    accepts[[number[state] for state in finals]] = True
    classes, token_class = step.unique(dim=1, return_inverse=True)
    automaton = Automaton(classes, token_class, accepts, min_tokens, max_tokens)
    if not automaton.can[0, 0]:
        raise SupportError(
            f"no text of {min_tokens} to {max_tokens} allowed tokens matches {pattern!r}; widen the pattern, "
            "max_tokens or allowed_tokens"
        )
    return automaton


def _texts(lm: LanguageModel, allowed: Tensor) -> dict[int, str]:
    """The text of each allowed token. Raises SupportError where they do not add up to the text of a completion."""
    texts = {token: lm.decode([token]) for token in allowed.nonzero().squeeze(1).tolist()}
    texts = {token: text for token, text in texts.items() if text and BROKEN not in text}
    if lm.decode(list(texts)) != "".join(texts.values()):
        raise SupportError(
            f"{lm.name}: its tokenizer changes the text of a token by what stands beside it, so a pattern cannot be "
            "read token by token; put constraint.matches(pattern) into the target"
        )
    return texts
