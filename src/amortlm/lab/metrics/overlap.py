"""BLEU-4 and GLEU-4, in percent, against one reference each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from amortlm.errors import DataError, MissingExtraError


def sentence_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """BLEU-4 of every pair by sacrebleu, 0 to 100: 13a tokens, exponential smoothing, effective order.

    Not comparable with `corpus_bleu`, which pools n-gram counts over the pairs.
    """
    check_pairs(hypotheses, references)
    bleu = _sacrebleu().BLEU(effective_order=True)
    pairs = zip(hypotheses, references, strict=True)
    return [bleu.sentence_score(hypothesis, [reference]).score for hypothesis, reference in pairs]


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the corpus by sacrebleu with its defaults, 0 to 100."""
    check_pairs(hypotheses, references)
    return _sacrebleu().BLEU().corpus_score(list(hypotheses), [list(references)]).score


def sentence_gleu(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """GLEU-4 of every pair by nltk (Wu et al. 2016), 0 to 100, on the tokens that BLEU counts."""
    check_pairs(hypotheses, references)
    try:
        from nltk.translate.gleu_score import sentence_gleu as gleu
    except ImportError as e:
        raise MissingExtraError("GLEU needs nltk: pip install 'amortlm[baselines]'") from e
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
    _sacrebleu()
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as e:
        raise MissingExtraError("BLEU needs sacrebleu: pip install 'amortlm[baselines]'") from e
    return sacrebleu
