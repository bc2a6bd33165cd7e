"""Sentences that go on with a story and contain given words (a lexical constraint, after CommonGen).

The posterior is p(z | x) restricted to the sentences z with both words. Rejection (the untrained model on x alone)
draws from it exactly, but few of its samples have the words; a GFlowNet is shown the words and learns to draw from it.

    python recipes/constrained.py --output runs/constrained
    python recipes/constrained.py --data ../shared/data/commongen --output runs/commongen
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path

import torch

from _common import Figures, average, metrics
from amortlm import LanguageModel, Posterior, Support, constraint, importance
from amortlm.errors import DataError
from amortlm.lab import command
from amortlm.lab.experiment import Context, Experiment, Outcome, Results, Settings, Trained
from amortlm.lab.tasks.infilling import STORIES
from amortlm.lab.training import Problem, train_gflownet, untrained
from amortlm.train import GFNConfig
from amortlm.types import Row

HINTED = "{words}.</s><s>{x}"  # the words as a document of their own, then the story
SUPPORT = Support(stop=".", min_tokens=3, max_tokens=21)
SETTINGS: Settings = {
    "model": "embedded",
    "rows": 64,  # to train on
    "measured": 8,  # of these, and of unseen ones
    "samples": 512,  # of each row that is measured
    "adapter": 16,
    "gflownet": {
        "objective": {"subtb": {"states": 6}},
        "max_steps": 150,
        "num_samples": 12,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
    },
}


def has_words(text: str, row: Row) -> bool:
    """Does the text contain each of the row's words as a whole word, ignoring case? Words differ by row."""
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


@dataclass(frozen=True)
class Task:
    """The posterior under a prompt with the words. measured: the measured rows of each group."""

    problem: Problem
    measured: dict[str, list[Row]]


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Task:
    """Rows of CommonGen in the folder --data, or of our stories. Raises DataError."""
    n, measured = settings["rows"], settings["measured"]
    rows = stories(n + measured) if data is None else concepts(data, n + measured)
    gold = [[row["gold"].rstrip(".")] if "gold" in row else [] for row in rows[:n]]
    target = lm.log_prob("{z}", given="{x}") + constraint.predicate(has_words)
    problem = Problem(target, HINTED, SUPPORT, rows[:n], gold)
    return Task(problem, {"trained on": rows[:measured], "unseen": rows[n:]})


def rejection(context: Context) -> Trained:
    problem = context.data.problem
    return untrained(context, Problem(problem.target, "{x}", problem.support))


def shown_the_words(context: Context) -> Trained:
    return untrained(context, context.data.problem)


def gflownet(context: Context) -> Trained:
    return train_gflownet(context, context.data.problem, context.settings["gflownet"])


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Of each group. `log p` is that of the samples with all words; rejection has the exact one."""
    out = dict.fromkeys(METRICS, nan)
    for group, rows in context.data.measured.items():
        found = average(
            [_row(trained.sampler, row, context.settings["samples"], context.seed) for row in rows]
        )
        share = found["has the words"]
        found["samples per good one"] = 1 / share if share else inf  # all rows together
        out |= {f"{group}: {name}": value for name, value in found.items()}
    return Outcome(out)


def _row(posterior: Posterior, row: Row, n: int, seed: int) -> Figures:
    samples = posterior.sample(row, n, seed=("measure", seed))
    log_r = torch.tensor([s.log_reward for s in samples])
    found = importance.estimate(log_r - torch.tensor([s.log_q for s in samples]), log_r)
    good = [s.text for s, r in zip(samples, log_r, strict=True) if r.isfinite()]
    out = {"has the words": found.valid, "rows without any": float(not good)}
    if good:  # the other figures are means over rows with a good sample
        out |= {"log p": found.log_reward, "distinct": len(set(good)) / len(good), "log Z": found.log_z}
    return out


def notes(results: Results) -> str:
    s = results["settings"]
    return (
        f"{s['samples']} samples a row; means over {s['measured']} of the {s['rows']} rows trained on and as many "
        "unseen ones, ± between seeds. log p (nats) is log p(z | x) of samples with all words, log Z the importance "
        "estimate of the log of p(all words | x); both, and distinct, are means over rows with at least one such "
        "sample. Rejection draws from the exact posterior, so its log p is what a perfect sampler has on those rows."
    )


FIGURES = ("has the words", "rows without any", "log p", "distinct", "log Z")
GROUPS = ("trained on", "unseen")
METRICS = (
    *(f"{group}: {name}" for group in GROUPS for name in FIGURES),
    *(f"{group}: samples per good one" for group in GROUPS),
)
EXPERIMENT = Experiment(
    name="constrained",
    question="Which share of samples has the given words: by rejection, shown the words, and after training?",
    presets={"small": SETTINGS},
    groups={"gflownet": GFNConfig},
    prepare=prepare,
    reads_data=True,
    methods={"rejection": rejection, "shown the words": shown_the_words, "GFlowNet": gflownet},
    evaluate=evaluate,
    metrics=metrics(*METRICS),
    rows="metrics",
    summary=notes,
)

if __name__ == "__main__":
    command.main(EXPERIMENT)
