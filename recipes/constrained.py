"""Sentences that go on with a story and contain given words (a lexical constraint, after CommonGen).

The posterior is p(z | x) restricted to the sentences z with both words. Rejection, the untrained model on x alone,
draws from it exactly and rarely; a GFlowNet is shown the words and learns to draw from it directly.

    python recipes/constrained.py --output runs/constrained
    python recipes/constrained.py --data ../shared/data/commongen --output runs/commongen
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from _common import Metrics, Results, average, load_model, parser, train, untrained
from amortlm import Posterior, Support, constraint, importance
from amortlm.errors import DataError
from amortlm.lab.tasks.infilling import STORIES
from amortlm.types import Row

HINTED = "{words}.</s><s>{x}"  # the words as a document of their own, then the story
SUPPORT = Support(stop=".", min_tokens=3, max_tokens=21)
CONFIG = {
    "objective": {"subtb": {"states": 6}},
    "num_samples": 12,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-3,
}


def has_words(text: str, row: Row) -> bool:
    """Each of the row's words as a whole word, letter case ignored. One term for all rows: words differ by row."""
    return all(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in row["words"].split())


def stories(count: int) -> list[Row]:
    """Stories with the two longest new words of the sentence that follows, and that sentence."""
    rows: list[Row] = []
    for story in STORIES:
        old = set(re.findall(r"[a-z]+", story["x"].lower()))
        new = [w for w in re.findall(r"\b[a-z]{4,}\b", story["gold"]) if w not in old]
        words = sorted(dict.fromkeys(new), key=len, reverse=True)[:2]
        if len(words) == 2:
            rows.append({"x": story["x"], "words": " ".join(words), "gold": story["gold"]})
    return _checked(rows, count, "the stories")


def concepts(folder: Path, count: int) -> list[Row]:
    """Different concept sets of CommonGen, three to five words, without a beginning."""
    file = folder / "commongen.dev.jsonl"
    try:
        found = [json.loads(line)["concept_set"] for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{file}: cannot read concept sets ({type(e).__name__}: {e})") from e
    words = (" ".join(c.split("_")[0] for c in concept.split("#")) for concept in dict.fromkeys(found))
    return _checked([{"x": "", "words": w} for w in words], count, str(file))


def _checked(rows: list[Row], count: int, where: str) -> list[Row]:
    if len(rows) < count:
        raise DataError(f"{where}: {len(rows)} rows with words; asked for {count}")
    return rows[:count]


def measure(posterior: Posterior, rows: list[Row], n: int, group: str, seed: int) -> Metrics:
    """Figures of n samples a row. `log p` is that of the samples with all words; rejection has the exact one."""
    return {f"{group}: {k}": v for k, v in average([_row(posterior, r, n, seed) for r in rows]).items()}


def _row(posterior: Posterior, row: Row, n: int, seed: int) -> Metrics:
    samples = posterior.sample(row, n, seed=("measure", seed))
    log_r = torch.tensor([s.log_reward for s in samples])
    found = importance.estimate(log_r - torch.tensor([s.log_q for s in samples]), log_r)
    good = [s.text for s, r in zip(samples, log_r, strict=True) if r.isfinite()]
    out = {"has the words": found.valid, "rows without any": float(not good)}
    if good:  # the other figures are means over rows with a good sample
        out |= {"log p": found.log_reward, "distinct": len(set(good)) / len(good), "log Z": found.log_z}
    return out


def draws_per_good(metrics: Metrics) -> Metrics:
    """Samples per good one, all rows together."""
    out = dict(metrics)
    for group in ("trained on", "unseen"):
        share = metrics[f"{group}: has the words"]
        out[f"{group}: samples per good one"] = 1 / share if share else float("inf")
    return out


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "constrained", steps=150, seeds=3)
    options.add_argument("--data", type=Path, help="folder of CommonGen (default: our stories)")
    options.add_argument("--rows", type=int, default=64, help="rows to train on")
    options.add_argument("--measured", type=int, default=8, help="rows of these, and unseen ones, to measure")
    options.add_argument("--samples", type=int, default=512, help="samples a row that are measured")
    options.add_argument("--objective", default="subtb")
    args = options.parse_args(argv)
    lm = load_model(args.model)
    count = args.rows + args.measured
    rows = concepts(args.data, count) if args.data else stories(count)
    shown = rows[: args.rows]
    groups = {"trained on": shown[: args.measured], "unseen": rows[args.rows :]}
    config = {**CONFIG, "objective": args.objective, "max_steps": args.steps}
    settings = {
        **config,
        "model": args.model,
        "rows": rows,
        "measured": args.measured,
        "samples": args.samples,
    }
    results = Results(args.output, "Sentences with given words", settings)
    target = lm.log_prob("{z}", given="{x}") + constraint.predicate(has_words)

    def figures(posterior: Posterior, seed: int) -> Metrics:
        parts = [measure(posterior, part, args.samples, name, seed) for name, part in groups.items()]
        return draws_per_good({k: v for part in parts for k, v in part.items()})

    def gflownet(seed: int) -> Posterior:
        gold = [[row["gold"].rstrip(".")] if "gold" in row else [] for row in shown]
        return train(lm, target, HINTED, SUPPORT, shown, gold=gold, seed=seed, **config)

    for seed in range(args.seeds):
        results.run("rejection", seed, lambda s=seed: figures(untrained(lm, target, "{x}", SUPPORT), s))
        results.run(
            "shown the words", seed, lambda s=seed: figures(untrained(lm, target, HINTED, SUPPORT), s)
        )
        results.run("GFlowNet", seed, lambda s=seed: figures(gflownet(s), s))
    results.finish(
        f"{args.samples} samples a row; means over {args.measured} of the {args.rows} rows trained on and as many "
        "unseen ones, ± between seeds. log p (nats) is log p(z | x) of samples with all words, log Z the importance "
        "estimate of the log of p(all words | x); both, and distinct, are means over rows with at least one such "
        "sample. Rejection draws from the exact posterior, so its log p is what a perfect sampler has on those rows."
    )


if __name__ == "__main__":
    main()
