"""BLEU-4 and GLEU-4, in percent, against one reference each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from amortlm.errors import DataError
from amortlm.lab.extras import extra


def sentence_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """BLEU-4 of every pair by sacrebleu, 0 to 100: 13a tokens, exponential smoothing, effective order.

    Not comparable with corpus BLEU, which pools n-gram counts over the pairs. Raises DataError (see `check_pairs`).
    """
    check_pairs(hypotheses, references)
    bleu = extra("sacrebleu", "BLEU").BLEU(effective_order=True)
    pairs = zip(hypotheses, references, strict=True)
    return [bleu.sentence_score(hypothesis, [reference]).score for hypothesis, reference in pairs]


def sentence_gleu(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """GLEU-4 of every pair by nltk (Wu et al. 2016), 0 to 100, on the tokens that BLEU counts."""
    check_pairs(hypotheses, references)
    gleu = extra("nltk.translate.gleu_score", "GLEU").sentence_gleu
    tokenize = _tokenizer()
    pairs = zip(hypotheses, references, strict=True)
    return [100 * gleu([tokenize(r).split()], tokenize(h).split(), max_len=4) for h, r in pairs]


def check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise DataError unless there is one reference for each of at least one hypothesis."""
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise DataError("give lists of texts, not one text")
    if len(hypotheses) != len(references) or not hypotheses:
        raise DataError(
            f"{len(hypotheses)} hypotheses and {len(references)} references: give one for one, at least one"
        )


@lru_cache
def _tokenizer() -> Any:
    return extra("sacrebleu.tokenizers.tokenizer_13a", "GLEU").Tokenizer13a()
