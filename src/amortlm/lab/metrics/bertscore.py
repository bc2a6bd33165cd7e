"""BERTScore (Zhang et al. 2020): precision and recall of tokens matched by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortlm.lab.metrics.embedding import encoder_folder
from amortlm.lab.metrics.overlap import check_pairs


@dataclass(frozen=True)
class BertScores:
    """precision, recall, f1: a value for every pair, at most 1."""

    precision: list[float]
    recall: list[float]
    f1: list[float]


class BertScorer:
    """Greedy matching of last-layer token embeddings, without idf weights and without baseline rescaling.

    Special tokens take no part. A text without tokens scores 0. Figures cannot be compared with those of another
    encoder or layer, or with rescaled ones. encoder: a local folder; default: that of `sentence_encoder`.
    """

    def __init__(self, encoder: str | Path | None = None, device: str = "cpu", batch_size: int = 64):
        from transformers import AutoModel, AutoTokenizer

        folder = str(encoder_folder(encoder))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        self.encoder, self.batch_size = model.to(device).eval(), batch_size

    def __call__(self, hypotheses: Sequence[str], references: Sequence[str]) -> BertScores:
        check_pairs(hypotheses, references)
        vectors = self.token_vectors([*hypotheses, *references])
        n = len(hypotheses)
        scores = [match(h, r) for h, r in zip(vectors[:n], vectors[n:], strict=True)]
        return BertScores(*(list(values) for values in zip(*scores, strict=True)))

    @torch.no_grad()
    def token_vectors(self, texts: Sequence[str]) -> list[Tensor]:
        """Unit vectors [tokens, d] of each text."""
        out = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            words = ~batch.pop("special_tokens_mask").bool()  # padding counts as special
            hidden = self.encoder(**batch.to(self.encoder.device)).last_hidden_state.float().cpu()
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
            out += [vectors[keep] for vectors, keep in zip(hidden, words, strict=True)]
        return out


def match(hypothesis: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F1 of unit vectors [n, d] against [m, d]: every vector takes its nearest."""
    if len(hypothesis) == 0 or len(reference) == 0:
        return 0.0, 0.0, 0.0
    cosine = hypothesis @ reference.T
    precision, recall = cosine.amax(1).mean().item(), cosine.amax(0).mean().item()
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total > 0 else 0.0
