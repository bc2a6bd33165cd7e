"""A base model for the subjectivity experiment: the embedded model, fine-tuned on sentences of film reviews, stories
and descriptions, each with a remark that tends to fit its kind (opinion or account).

    python recipes/review_model.py --data ../shared/data --output runs/review-model

The embedded model was trained on remarks on made-up sentences, and on real sentences only if they were opinions: so it
treats every real sentence as an opinion. Here opinions are from SST-2, accounts from ROCStories and CommonGen. Labels
occur only after remarks on made-up sentences, never after remarks on real ones. So the model can write a remark on a
real sentence, and can label a remark, but has never seen both together for a real sentence. The experiment's own
sentences are left out, and so is every sentence that shares six words in a row with one of them.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from amortlm import LanguageModel
from amortlm.errors import DataError
from embedded import reviews
from embedded.corpus import clean, read_jsonl_text, read_lines, read_sst2
from embedded.review_words import PHRASES
from fine_tuning import base_model_parser, fine_tune

MADE_UP = 0.25  # share of sentences that are generated, as the embedded model knows them
SHARED = 6  # words in a row


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """All runs of six words in a text; a shorter text is one run."""
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + SHARED]) for i in range(max(1, len(words) - SHARED + 1))}


class Unseen:
    """Selects sentences that share no six words in a row with a sentence of SUBJ, and equal no shorter one."""

    def __init__(self, data: Path):
        own = [
            text for part in ("train", "test") for text in read_jsonl_text(data / "subj" / f"{part}.jsonl")
        ]
        self.runs = set().union(*map(runs_of_words, own))

    def of(self, texts: list[str]) -> list[str]:
        new = [text for text in texts if not runs_of_words(text) & self.runs]
        return [text for text in new if '"' not in text]  # a question quotes its sentence


def opinions(data: Path) -> list[str]:
    """The sentences of SST-2, from the same reviews as those of SUBJ."""
    return Unseen(data).of(read_sst2(data / "sst2" / "train.txt"))


def accounts(data: Path) -> list[str]:
    """One or two sentences in a row of a ROCStories story (past tense), and as many of CommonGen (present)."""
    stories = []
    for line in (data / "rocstories" / "stories.tsv").read_text(encoding="utf-8").splitlines():
        sentences = [clean(s) for s in re.split(r"(?<=[.!?]) ", line.split("\t")[-1]) if s.strip()]
        for i in range(0, len(sentences) - 1, 2):
            stories.append(" ".join(sentences[i : i + 1 + (len(stories) % 2)]))
    lines = read_lines(data / "commongen" / "commongen.train.tgt.txt")[: len(stories)]
    described = [re.sub(r"([.,])", r" \1", line.lower().rstrip(" .")) + " ." for line in lines]
    return Unseen(data).of(stories + described)


def document(rng: random.Random, sentences: dict[str, list[str]]) -> tuple[str, str]:
    """A question and its continuation: remark and label of a made-up sentence, or a remark on a real sentence."""
    if rng.random() < MADE_UP:
        review = reviews.review(f"review model {rng.getrandbits(60)}")
        return review.question, f" {review.phrase}{review.ending}"
    kind = rng.choice(reviews.LABELS)
    said = rng.choices((kind, "neutral", reviews.other_label(kind)), reviews.PHRASE_SHARES)[0]
    review = reviews.Review(rng.choice(sentences[kind]), rng.choice(PHRASES[said]), kind)
    return review.question, f" {review.phrase},"


def main(argv: list[str] | None = None) -> None:
    options = base_model_parser(
        __doc__, "review-model", steps=600, batch=32, learning_rate=1e-3, of="sentences per step"
    )
    options.add_argument(
        "--data", type=Path, required=True, help="folder with subj, sst2, rocstories and commongen"
    )
    args = options.parse_args(argv)
    try:
        sentences = {"subjective": opinions(args.data), "objective": accounts(args.data)}
    except (OSError, ValueError, KeyError) as e:
        raise DataError(
            f"{args.data}: cannot read subj, sst2, rocstories and commongen ({type(e).__name__}: {e})"
        ) from e
    lm = LanguageModel.from_pretrained(args.model)
    rng = random.Random(args.seed)

    def batch() -> list[tuple[list[int], int]]:
        texts = [document(rng, sentences) for _ in range(args.batch)]
        parts = [(lm.encode_start(asked), lm.encode_continuation(said)) for asked, said in texts]
        return [([*asked, *said], len(said)) for asked, said in parts]  # only the continuation has a loss

    fine_tune(lm, batch, args.steps, args.learning_rate, args.output)


if __name__ == "__main__":
    main()
