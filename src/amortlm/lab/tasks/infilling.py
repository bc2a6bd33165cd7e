"""Story infilling (Hu et al. 2024, section 4.3): the missing fourth sentence of a five-sentence story.

x = sentences 1 to 3, y = sentence 5, z = sentence 4; R(z) = p(z y | x), so q samples p(z | x, y).
"""

from __future__ import annotations

import re
from pathlib import Path

from amortlm.data import load_rows
from amortlm.errors import DataError
from amortlm.train.spec import RunSpec
from amortlm.types import Row

STORIES = load_rows(Path(__file__).parent / "stories.jsonl")  # x, y, and gold: the fourth sentence as written
TRAINED = 12  # stories the posterior is amortised over
UNSEEN = STORIES[TRAINED:20]

SPEC = RunSpec(
    # The ending, then the beginning as a document of its own, since the model continues the last document.
    prompt="{y}</s><s>{x}",
    target=[{"log_prob": {"of": "{z} {y}", "given": "{x}"}}],
    support={"stop": ".", "min_tokens": 3, "max_tokens": 20},
    data=[dict(row) for row in STORIES[:TRAINED]],
    adapter=32,
    config={
        "max_steps": 100,
        "num_samples": 12,
        "per_device_train_batch_size": 6,
        "objective": {"subtb": {"states": 6}},
        "learning_rate": 2e-3,
        "diagnose_steps": 0,
    },
)


def read_stories(path: Path) -> list[Row]:
    """Stories of five sentences as x, y, gold: rows with these columns (.jsonl, .json, .csv, .tsv with a header),
    ROCStories lines (title TAB story), or running text such as TinyStories. A folder stands for its text file."""
    if path.is_dir():
        names = ("stories.tsv", "train_head.txt", "stories.jsonl")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.suffix in (".jsonl", ".json", ".csv"):
        return [*load_rows(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read stories ({e}); give a text, .tsv or .jsonl file") from e
    if path.suffix == ".tsv":
        stories = [line.split("\t", 1)[-1] for line in text.splitlines()]
    else:
        stories = re.split(r"<\|endoftext\|>|(?=Once upon a time)", text)
    rows = [five_sentences(story) for story in stories]
    return [row for row in rows if row is not None]


def five_sentences(story: str) -> Row | None:
    """x, gold, y of the first five sentences; None where the last two are not plain statements.

    White space before punctuation, as tokenised corpora have it, is removed: " ." is another token than ".".
    """
    text = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(story.split()))
    found = re.split(r"(?<=[.!?])\s+", text)[:5]
    if len(found) < 5 or not all(re.fullmatch(r"[\w ,']+\.", s) for s in found[3:]):
        return None
    return {"x": " ".join(found[:3]), "gold": " " + found[3], "y": found[4]}
