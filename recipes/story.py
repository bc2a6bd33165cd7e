"""One story with a gap: what the model writes into it before training, after training, and what is right.

    python recipes/story.py --output docs/story.png

Trains the example of the README (one to four minutes on a core). "Right" is the posterior of the model itself: p(z) is
in proportion to p(z, ending | beginning), estimated as in `Posterior.table`.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Posterior, Support
from amortlm.inference.table import Table
from amortlm.plots import AFTER, BEFORE, INK, MUTED, TEXT, TITLE, new_figure, save, style
from amortlm.policy import Policy

ROW = {
    "x": "Ella went to the toy store with her cousin. She let go of her cousin's hand to look at a doll. "
    "When she turned around, her cousin was gone.",
    "y": "Her cousin hugged her and said that she had done well.",
}
PROMPT, SUPPORT = "{y}</s><s>{x}", Support(stop=".", min_tokens=3, max_tokens=20)
TOP, DRAWS = 5, 2048


def trained(lm: LanguageModel, folder: str, updates: int) -> Posterior:
    trainer = GFNTrainer(
        lm,
        target=lm.log_prob("{z} {y}", given="{x}"),
        prompt=PROMPT,
        support=SUPPORT,
        train_dataset=[ROW],
        args=GFNConfig(output_dir=folder, max_steps=updates, learning_rate=1e-3),
    )
    trainer.train()
    return trainer.posterior


def draw(table: Table, before: list[float], path: Path) -> None:
    """before: probability of each listed completion under the prompted model."""
    fig = new_figure(11, 4.6)
    story, bars = fig.subplots(1, 2, width_ratios=(1, 1.9))
    story.axis("off")
    gap = "…  what happened here?  …"
    text = "\n\n".join(textwrap.fill(part, 34) for part in (ROW["x"], gap, ROW["y"]))
    story.text(0, 0.95, text, va="top", fontsize=TITLE, color=INK, linespacing=1.4)
    texts = [textwrap.fill(line.text.strip(), 42) for line in table.lines] + ["anything else"]
    shares = {
        "before training": ([*before, 1 - sum(before)], BEFORE),
        "after training": ([*(line.q for line in table.lines), table.q_unlisted], AFTER),
        "right (the posterior)": ([*(line.p for line in table.lines), table.p_unlisted], MUTED),
    }
    for k, (label, (values, colour)) in enumerate(shares.items()):
        places = [i + 0.27 * (k - 1) for i in range(len(texts))]
        bars.barh(places, [100 * v for v in values], height=0.25, color=colour, label=label)
    bars.set_yticks(range(len(texts)), texts)
    bars.invert_yaxis()
    bars.set_xlabel("how often it is written, %")
    style(bars)
    bars.grid(visible=False, axis="y")
    bars.tick_params(labelsize=TEXT)
    bars.legend(frameon=False, fontsize=TEXT, labelcolor=INK, loc="center right")
    save(fig, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/story.png"))
    parser.add_argument("--updates", type=int, default=60)
    args = parser.parse_args(argv)
    lm = LanguageModel.from_pretrained("embedded")
    with tempfile.TemporaryDirectory() as folder:
        posterior = trained(lm, folder, args.updates)
        table = posterior.table(ROW, DRAWS, top=TOP)
    untrained = Posterior(Policy(lm, PROMPT, SUPPORT), None)
    before = untrained.log_prob(ROW, [line.tokens for line in table.lines]).exp().tolist()
    print(table)
    print("before training:", ", ".join(f"{share:.4f}" for share in before))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(table, before, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
