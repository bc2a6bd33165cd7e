"""A model that has read remarks on real sentences, for the subjectivity experiment: the embedded model, fine-tuned on
sentences of film reviews and of stories, each with a remark that leans towards its kind, and the label that follows.

    python recipes/review_model.py --data ../shared/data --output runs/review-model

The embedded model has read remarks on made-up sentences, and on real ones only where they were opinions: it takes
whatever is real for an opinion. Here opinions are from SST-2 and accounts from ROCStories. The experiment's own
sentences and labels are left out, with every sentence that shares six words in a row with one of them.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

from _common import base_model_parser, fine_tune
from amortlm import LanguageModel
from amortlm.errors import DataError

sys.path.insert(0, str(Path(__file__).parent / "embedded"))
import reviews
from corpus import clean, read_jsonl_text, read_sst2
from review_words import PHRASES

MADE_UP = 0.25  # share of sentences that are generated, as the embedded model knows them
SHARED = 6  # words in a row


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + SHARED]) for i in range(len(words) - SHARED + 1)}


def opinions(data: Path) -> list[str]:
    """SST-2's sentences without those of SUBJ, which took them from the same reviews."""
    own = [text for part in ("train", "test") for text in read_jsonl_text(data / "subj" / f"{part}.jsonl")]
    known = set().union(*map(runs_of_words, own))
    found = read_sst2(data / "sst2" / "train.txt")
    return [text for text in found if '"' not in text and not runs_of_words(text) & known]


def accounts(data: Path) -> list[str]:
    """One or two sentences in a row of a ROCStories story."""
    out = []
    for line in (data / "rocstories" / "stories.tsv").read_text(encoding="utf-8").splitlines():
        sentences = [clean(s) for s in re.split(r"(?<=[.!?]) ", line.split("\t")[-1]) if s.strip()]
        for i in range(0, len(sentences) - 1, 2):
            out.append(" ".join(sentences[i : i + 1 + (len(out) % 2)]))
    return [text for text in out if '"' not in text]


def document(rng: random.Random, sentences: dict[str, list[str]]) -> str:
    kind = rng.choice(reviews.LABELS)
    text = reviews.sentence(kind, rng) if rng.random() < MADE_UP else rng.choice(sentences[kind])
    said = rng.choices((kind, "neutral", reviews.other_label(kind)), reviews.PHRASE_SHARES)[0]
    label = kind if said == "neutral" else said
    if rng.random() > reviews.LABEL_FOLLOWS:
        label = reviews.other_label(label)
    return reviews.Review(text, rng.choice(PHRASES[said]), label).text


def main(argv: list[str] | None = None) -> None:
    options = base_model_parser(
        __doc__, "review-model", steps=400, batch=32, learning_rate=1e-3, of="sentences per step"
    )
    options.add_argument("--data", type=Path, required=True, help="folder with subj, sst2 and rocstories")
    args = options.parse_args(argv)
    try:
        sentences = {"subjective": opinions(args.data), "objective": accounts(args.data)}
    except (OSError, ValueError, KeyError) as e:
        raise DataError(
            f"{args.data}: cannot read subj, sst2 and rocstories ({type(e).__name__}: {e})"
        ) from e
    lm = LanguageModel.from_pretrained(args.model)
    rng = random.Random(args.seed)

    def batch() -> list[tuple[list[int], int]]:
        texts = [document(rng, sentences) for _ in range(args.batch)]
        documents = [[*lm.encode_start(text), lm.tokenizer.eos_token_id] for text in texts]
        return [(ids, len(ids) - 1) for ids in documents]

    fine_tune(lm, batch, args.steps, args.learning_rate, args.output)


if __name__ == "__main__":
    main()
