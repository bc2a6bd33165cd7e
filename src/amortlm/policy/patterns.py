"""Supports whose completions match a regular expression: constrained decoding, for q in training and in sampling."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amortlm.errors import MissingExtraError, SupportError
from amortlm.policy.automaton import Automaton

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

BROKEN = "\ufffd"  # what part of a character decodes to
# Ends a text: without it the library takes the first alternative that matches a beginning ("a" of "a|ab"), and no token
# that ends between two matches ("(ab)*").
END = "\U0010ffff"


def pattern_automaton(
    pattern: str, lm: LanguageModel, allowed: Tensor, min_tokens: int, max_tokens: int
) -> Automaton:
    """The automaton over tokens of `allowed` [V] whose texts, outer white space removed, match the pattern.

    Tokens that are a part of a character are never written. Raises MissingExtraError, and SupportError for a pattern
    that is not regular or matches nothing of min_tokens to max_tokens such tokens.
    """
    step, accepts = _tables(pattern, _texts(lm, allowed), len(allowed))
    classes, token_class = step.unique(dim=1, return_inverse=True)
    automaton = Automaton(classes, token_class, accepts, min_tokens, max_tokens)
    if not automaton.can[0, 0]:
        raise SupportError(
            f"no text of {min_tokens} to {max_tokens} allowed tokens matches {pattern!r}; widen the pattern, "
            "max_tokens or allowed_tokens"
        )
    return automaton


def _tables(pattern: str, texts: dict[int, str], size: int) -> tuple[Tensor, Tensor]:
    """(state after each token [S, size], S where there is none; may a text end here [S]) of texts by token."""
    transitions, finals, start = _index(pattern, texts, size)
    states, number = [start], {start: 0}
    for state in states:  # grows: those that tokens lead to
        for token, after in transitions.get(state, {}).items():
            if token < size and after not in number:
                number[after] = len(states)
                states.append(after)
    step = torch.full((len(states), size), len(states))
    for state in states:
        moves = {token: number[after] for token, after in transitions.get(state, {}).items() if token < size}
        step[number[state], list(moves)] = torch.tensor(list(moves.values()), dtype=torch.long)
    return step, torch.tensor([transitions.get(state, {}).get(size) in finals for state in states])


def _index(pattern: str, texts: dict[int, str], size: int) -> tuple[dict[int, dict[int, int]], set[int], int]:
    """(transitions, final states, first state) as outlines-core has them; token `size` writes END."""
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as e:
        raise MissingExtraError(
            "a support's pattern needs outlines-core: pip install 'amortlm[patterns]'"
        ) from e
    ids = {END.encode(): [size]}
    for token, text in texts.items():
        ids.setdefault(text.encode(), []).append(token)
    for byte in range(256):  # a vocabulary with which some state has no way on is refused
        ids.setdefault(bytes([byte]), []).append(size + 1)
    try:
        re.compile(pattern)  # a part of it alone is none: "a)|(b"
        found = Index(rf"\s*(?:{pattern})\s*{END}", Vocabulary(size + 2, ids))
    except (ValueError, re.error) as e:
        raise SupportError(
            f"pattern {pattern!r}: {e}. A pattern is a regular expression without look-around and back-references, and "
            "without ^, $ and \\b: the whole text is matched anyway"
        ) from None
    return found.get_transitions(), found.get_final_states(), found.get_initial_state()


def _texts(lm: LanguageModel, allowed: Tensor) -> dict[int, str]:
    """The text of each allowed token. Raises SupportError where they do not add up to the text of a completion."""
    texts = {token: lm.decode([token]) for token in allowed.nonzero().squeeze(1).tolist()}
    texts = {token: x for token, x in texts.items() if x and BROKEN not in x and END not in x}
    twice = [*texts, *reversed(texts)]
    if lm.decode(twice) != "".join(texts[token] for token in twice):
        raise SupportError(
            f"{lm.name}: its tokenizer changes the text of a token by what stands beside it, so a pattern cannot be "
            "read token by token; put constraint.matches(pattern) into the target"
        )
    return texts
