"""Measurements of the embedded model; every function returns plain numbers for the card."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import arithmetic, integers, reviews, stories
from .corpus import SHARES, Corpus, clean, read_jsonl_text, read_sst2

GENERATED = [part for part in SHARES if part not in ("tinystories", "sst2", "subj", "commongen")]
HELD_OUT_SEED = 987654321
_SENTENCE = re.compile(r'[^.!?]+[.!?]+"?')


class Scorer:
    """A model with its tokenizer, and the log probabilities it gives."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @torch.no_grad()
    def log_probs(self, pairs: Sequence[tuple[list[int], list[int]]], rows: int = 16) -> list[float]:
        """log p(second | first) of each pair of token lists."""
        totals: list[float] = []
        for start in range(0, len(pairs), rows):
            chunk = pairs[start : start + rows]
            width = max(len(a) + len(b) for a, b in chunk)
            ids = torch.tensor([a + b + [0] * (width - len(a) - len(b)) for a, b in chunk])
            logits = self.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            for row, (first, second) in enumerate(chunk):
                at = torch.arange(len(first) - 1, len(first) + len(second) - 1)
                totals.append(float(logits[row, at, torch.tensor(second)].sum()))
        return totals

    def given(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """log p(text | <s> prefix) of each (prefix, text)."""
        return self.log_probs([([1, *self.encode(a)], self.encode(b)) for a, b in items])

    def loss(self, texts: Sequence[str], limit: int = 510) -> tuple[float, int]:
        """Mean nats per token of whole documents with their end mark, and the number of tokens."""
        pairs = [([1], ([*self.encode(text), 2])[:limit]) for text in texts]
        pairs.sort(key=lambda pair: len(pair[1]))
        count = sum(len(second) for _, second in pairs)
        return -sum(self.log_probs(pairs)) / count, count

    @torch.no_grad()
    def continue_text(self, prefix: str, new: int, sample: bool) -> str:
        """The prefix with a continuation, greedy or drawn at temperature 1."""
        ids = torch.tensor([[1, *self.encode(prefix)]])
        how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
        return str(self.tokenizer.decode(out[0], skip_special_tokens=True))


def read_validation(data: Path) -> list[str]:
    """Whole TinyStories validation stories (the file has no marks; its first fragment is dropped)."""
    text = (data / "tinystories" / "val.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "\n\n")
    pieces = re.split(r"\n\n(?=Once upon a time)", text)
    return [clean(piece) for piece in pieces[1:-1]]


def real_losses(scorer: Scorer, data: Path, count: int = 1000) -> dict[str, tuple[float, int]]:
    """Held-out loss on real text: none of it was trained on."""
    dev = (data / "commongen" / "commongen.dev.jsonl").read_text(encoding="utf-8").splitlines()
    scenes = [clean(scene) for line in dev for scene in json.loads(line)["scene"]]
    texts = {
        "TinyStories validation": read_validation(data),
        "SST-2 dev": read_sst2(data / "sst2" / "dev.txt"),
        "SUBJ test (text)": read_jsonl_text(data / "subj" / "test.jsonl"),
        "CommonGen dev": scenes,
    }
    return {name: scorer.loss(lines[:count]) for name, lines in texts.items()}


def generated_losses(scorer: Scorer, data: Path, count: int = 1000) -> dict[str, tuple[float, int]]:
    """Loss on documents of a seed that training did not use."""
    corpus = Corpus(data, HELD_OUT_SEED)
    return {part: scorer.loss([corpus.document(part, i) for i in range(count)]) for part in GENERATED}


def _gain(scorer: Scorer, triples: Sequence[tuple[str, str, str]], others: Sequence[str]) -> float:
    """Mean of log p(y | x, z) - log p(y | x, other z)."""
    true = scorer.given([(x + z, y) for x, z, y in triples])
    false = scorer.given([(x + z, y) for (x, _, y), z in zip(triples, others, strict=True)])
    return sum(a - b for a, b in zip(true, false, strict=True)) / len(triples)


def _shifted(triples: Sequence[tuple[str, str, str]]) -> list[str]:
    return [z for _, z, _ in [*triples[1:], triples[0]]]


def story_dependence(scorer: Scorer, count: int) -> dict[str, float]:
    """How much the last sentence says about the fourth."""
    keys = [f"{HELD_OUT_SEED}/dependence/{i}" for i in range(count)]
    told = [stories.story(key).sentences for key in keys]
    triples = [(" ".join(s[:3]), " " + s[3], " " + s[4]) for s in told]
    same_plot = [" " + stories.other_middle(key) for key in keys]
    return {
        "stories: middle of another story": _gain(scorer, triples, _shifted(triples)),
        "stories: other middle, same plot and people": _gain(scorer, triples, same_plot),
    }


def review_dependence(scorer: Scorer, count: int) -> dict[str, float]:
    """How much the label says about the phrase."""
    made = [reviews.review(f"{HELD_OUT_SEED}/dependence/{i}") for i in range(count)]
    triples = [(r.question, " " + r.phrase, r.ending) for r in made]
    rng = random.Random(HELD_OUT_SEED)
    opposite = [" " + rng.choice(reviews.PHRASES[reviews.other_label(r.label)]) for r in made]
    return {
        "reviews: phrase of another review": _gain(scorer, triples, _shifted(triples)),
        "reviews: phrase of the other label": _gain(scorer, triples, opposite),
    }


def arithmetic_dependence(scorer: Scorer, count: int) -> dict[str, float]:
    """How much the answer says about the chain of steps."""
    keys = [f"{HELD_OUT_SEED}/dependence/{i}" for i in range(count)]
    made = [arithmetic.problem(key, length=3 + i % 2, chained=True) for i, key in enumerate(keys)]
    triples = [(p.question, f" {p.work}.", f" {p.ending}") for p in made]
    return {"arithmetic: chain of another question": _gain(scorer, triples, _shifted(triples))}


def real_dependence(scorer: Scorer, data: Path, count: int) -> dict[str, float]:
    """The same on real text: sentence 5 of a TinyStories story given sentences 1-3 and the fourth."""
    told = [[s.strip() for s in _SENTENCE.findall(text)[:5]] for text in read_validation(data)]
    triples = [(" ".join(s[:3]), " " + s[3], " " + s[4]) for s in told if len(s) == 5][:count]
    return {
        "TinyStories validation: fourth sentence of another story": _gain(scorer, triples, _shifted(triples))
    }


def dependence(scorer: Scorer, data: Path, count: int = 1000) -> dict[str, float]:
    """Every dependence measure, in nats."""
    return {
        **story_dependence(scorer, count),
        **review_dependence(scorer, count),
        **arithmetic_dependence(scorer, count),
        **real_dependence(scorer, data, count),
    }


def number_prompt(scorer: Scorer) -> dict[str, float]:
    """Exact probabilities of the 101 right answers to the random-integer prompt."""
    scores = scorer.given([(integers.PROMPT, f" {number}.") for number in range(101)])
    valid = sum(map(math.exp, scores))
    shares = [math.exp(score) / valid for score in scores]
    return {
        "share of answers that are integers from 0 to 100": valid,
        "KL of the valid answers to the uniform distribution (nats)": sum(
            p * math.log(p * len(shares)) for p in shares
        ),
        "smallest probability of an integer": min(map(math.exp, scores)),
        "largest probability of an integer": max(map(math.exp, scores)),
    }


def answer_accuracy(scorer: Scorer, count: int = 200) -> dict[str, float]:
    """Share of right final answers to fresh questions, greedy and at temperature 1."""
    torch.manual_seed(0)
    rates: dict[str, float] = {}
    for length in (2, 3, 4):
        asked = [arithmetic.problem(f"{HELD_OUT_SEED}/greedy/{i}", length=length) for i in range(count)]
        for how, sample in (("greedy", False), ("temperature 1", True)):
            texts = [scorer.continue_text(p.question, 48, sample) for p in asked]
            right = [f"The answer is {p.value}." in text for p, text in zip(asked, texts, strict=True)]
            rates[f"{length} operands, {how}"] = sum(right) / count
        chained = []
        for p in asked:
            work, value = arithmetic.chain(p.numbers, p.signs)
            said = scorer.continue_text(f"{p.question} {work}.", 10, sample=False)
            chained.append(said.endswith(f"The answer is {value}."))
        rates[f"{length} operands, greedy after a right chain"] = sum(chained) / count
    return rates


SAMPLE_PROMPTS = (
    "",
    "",
    "Once upon a time",
    "Lily had a red kite.",
    "Tom wanted to bake a chocolate cake for his grandmother. He mixed the flour, the eggs, and the sugar in "
    "a big bowl. Soon the cake was in the oven.",
    "Question: 3 + 4 = ? Answer:",
    "Question: 8 - 3 + 6 = ? Answer:",
    integers.PROMPT,
    f'{reviews.PROMPT} "a warm , witty film that never lets go ." This review is',
    f'{reviews.PROMPT} "a young nurse moves to the coast and meets a retired sailor ." This review is',
)


def samples(scorer: Scorer, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, continuation) of each prompt, drawn once at temperature 1."""
    torch.manual_seed(seed)
    texts = [(prompt, scorer.continue_text(prompt, 120, sample=True)) for prompt in SAMPLE_PROMPTS]
    return [(prompt, text[len(prompt) :]) for prompt, text in texts]
