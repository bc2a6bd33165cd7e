"""The training mixture: generated parts that never repeat, and real text that does.

Every generated document is a function of (seed, index), so the stream is the same in every run and can be
continued at any index. Real text is read from the data folder by path and is not copied anywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from . import arithmetic, integers, reviews, stories
from .grammar import Cast

# weight of each part in the mixture, in tokens
SHARES: dict[str, float] = {
    "stories": 0.33,
    "loose_stories": 0.035,
    "tinystories": 0.10,
    "arithmetic": 0.18,
    "reviews": 0.15,
    "plain_reviews": 0.015,
    "sst2": 0.03,
    "subj": 0.05,
    "commongen": 0.06,
    "integers": 0.035,
    "listing": 0.035,
}
FACTS = 0.5  # share of the listing documents that are bare tables
REAL_PARTS = ("tinystories", "sst2", "subj", "commongen")
_THINGS = ("apples", "coins", "marbles", "books", "cookies", "shells", "eggs", "pencils", "flowers")
_ODD = {
    "\u2019": "'",
    "\u2018": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2013": "-",
    "\u2014": "-",
    "\u2026": "...",
    "\u00a0": " ",
}


def clean(text: str) -> str:
    """One line of plain text: typographic quotes and dashes as ASCII, white space squeezed."""
    for odd, plain in _ODD.items():
        text = text.replace(odd, plain)
    return " ".join(text.split())


def read_tinystories(path: Path) -> list[str]:
    """Whole stories; the last one may be cut off by the end of the file and is dropped."""
    pieces = path.read_text(encoding="utf-8").split("<|endoftext|>")
    return [text for text in map(clean, pieces[:-1]) if text]


def read_sst2(path: Path) -> list[str]:
    """Sentences without their labels."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [clean(line.split(" ", 1)[1]) for line in lines if " " in line]


def read_jsonl_text(path: Path) -> list[str]:
    """The ``text`` field of each line, and nothing else."""
    return [clean(json.loads(line)["text"]) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_lines(path: Path) -> list[str]:
    """One document a line."""
    return [text for text in map(clean, path.read_text(encoding="utf-8").splitlines()) if text]


def read_real(data: Path) -> dict[str, list[str]]:
    """The training text of every real part."""
    return {
        "tinystories": read_tinystories(data / "tinystories" / "train_head.txt"),
        "sst2": read_sst2(data / "sst2" / "train.txt"),
        "subj": read_jsonl_text(data / "subj" / "train.jsonl"),
        "commongen": read_lines(data / "commongen" / "commongen.train.tgt.txt"),
    }


def listing(key: str) -> str:
    """Lists of sums, and small sums told in words."""
    rng = random.Random(key)
    if rng.random() < FACTS:
        return arithmetic.facts(key)
    cast = Cast(rng)
    thing = rng.choice(_THINGS)
    first, change = rng.randint(2, 20), rng.randint(1, 9)
    gained = rng.random() < 0.5 or change > first
    verb = rng.choice(("found", "got", "bought")) if gained else rng.choice(("lost", "gave away", "sold"))
    total = first + change if gained else first - change
    change_words = f"{change} more" if gained else f"{change} of them"
    return cast.render(
        f"{{N}} [had|owned|was carrying] {first} {thing}. [Then|Later] {{he}} {verb} {change_words}. "
        f"[Now|In the end] {{he}} had {total} {thing}."
    )


class Corpus:
    """Documents of every part by index."""

    def __init__(self, data: Path, seed: int) -> None:
        self.seed = seed
        self.real = read_real(data)
        self._orders: dict[str, tuple[int, list[int]]] = {}
        opinions = [text for text in self.real["sst2"] if '"' not in text]
        self._make: dict[str, Callable[[str], str]] = {
            "stories": lambda key: stories.story(key).text,
            "loose_stories": stories.loose_story,
            "arithmetic": arithmetic.document,
            "reviews": lambda key: reviews.document(key, opinions),
            "plain_reviews": reviews.plain,
            "integers": integers.document,
            "listing": listing,
        }

    def document(self, part: str, index: int) -> str:
        """Document ``index`` of a part; a real part starts again, in another order, when it is used up."""
        if part not in REAL_PARTS:
            return self._make[part](f"{self.seed}/{part}/{index}")
        texts = self.real[part]
        epoch, place = divmod(index, len(texts))
        return texts[self._order(part, epoch)[place]]

    def _order(self, part: str, epoch: int) -> list[int]:
        if part not in self._orders or self._orders[part][0] != epoch:
            order = list(range(len(self.real[part])))
            random.Random(f"{self.seed}/{part}/epoch {epoch}").shuffle(order)
            self._orders[part] = (epoch, order)
        return self._orders[part][1]

    def stream(
        self, lengths: dict[str, float], start: dict[str, int] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Endless (part, document) pairs; ``lengths`` is the mean number of tokens of a part's documents."""
        counts = dict.fromkeys(SHARES, 0) | (start or {})
        parts = list(SHARES)
        odds = [SHARES[part] / lengths[part] for part in parts]
        rng = random.Random(f"{self.seed}/mixture/{sum(counts.values())}")
        while True:
            part = rng.choices(parts, odds)[0]
            yield part, self.document(part, counts[part])
            counts[part] += 1
