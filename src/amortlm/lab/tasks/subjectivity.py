"""Subjectivity of review sentences (Hu et al. 2024, section 4.4): x is a sentence, y its label, z a short reason."""

from __future__ import annotations

import json
from pathlib import Path

from amortlm.errors import DataError
from amortlm.types import Row

QUESTION = 'Classify this movie review as objective or subjective: "{x}" This review is'
OF = "{z} so it is {y}."
ANSWERS = ("objective", "subjective")


def read_reviews(file: Path, max_words: int) -> list[Row]:
    """Rows of a SUBJ file, cut after so many words. Raises DataError."""
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows: list[Row] = [
            {"x": " ".join(r["text"].split()[:max_words]), "y": r["label_text"]} for r in records
        ]
    except (OSError, ValueError, KeyError) as e:
        raise DataError(
            f"{file}: cannot read sentences ({type(e).__name__}: {e}); --data names a folder with train.jsonl and "
            "test.jsonl, whose lines have text and label_text"
        ) from e
    unknown = {row["y"] for row in rows} - set(ANSWERS)
    if unknown:
        raise DataError(f"{file}: label_text {sorted(unknown)[0]!r} is neither of {ANSWERS}")
    return rows


def made_up(count: int) -> list[Row]:
    """Made-up sentences, for runs that only show that every method works."""
    kinds = {
        "objective": "a nurse moves to town number {i} .",
        "subjective": "a warm and witty film , part {i} .",
    }
    return [{"x": kinds[ANSWERS[i % 2]].format(i=i), "y": ANSWERS[i % 2]} for i in range(count)]
