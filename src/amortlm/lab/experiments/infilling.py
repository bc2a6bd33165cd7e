"""Story infilling (Hu et al. 2024, section 4.3): the fourth sentence of five, given the others, on held-out stories.

R(z) = p(z y | x) with x the first three sentences and y the fifth. SFT sees the fourth sentences as written; the
GFlowNet never does. MCMC and SMC start anew on each test story, from the prompted model: slow, and near the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortlm.errors import DataError
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc as run_smc
from amortlm.lab.compare import (
    box_figure,
    boxes_digest,
    paired_digest,
    paired_table,
    shared_digest,
    shared_table,
)
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Results, Runs, Settings, Trained
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.infilling import STORIES, read_stories
from amortlm.lab.training import Problem, Split, from_supervised, train_gflownet, train_supervised, untrained
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.train import GFNConfig
from amortlm.types import Rollouts, Row
from amortlm.weights import effective_sample_size


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Split:
    """Stories of --data, or our own, as rows with x, y and gold, the fourth sentence as written. Raises DataError."""
    rows: Sequence[Row] = STORIES[20:] if data is None else read_stories(data)  # the first belong to the task
    support = Support(**settings["support"]).bind(lm)
    rows = [row for row in rows if support.contains(lm.encode_continuation(row["gold"].removesuffix(".")))]
    n, wanted = settings["test_stories"], settings["train_stories"]
    if len(rows) < n + wanted:
        raise DataError(
            f"{data or 'our own stories'}: {len(rows)} stories whose fourth sentence lies in the support, but "
            f"test_stories={n} and train_stories={wanted} are needed; lower these or give more data"
        )
    return Split(rows[-wanted - n : -n], rows[-n:])


def problem_of(context: Context, with_gold: bool = True) -> Problem:
    settings, rows = context.settings, context.data.train
    return Problem(
        context.lm.log_prob(settings["of"], given=settings["given"]),
        settings["prompt"],
        Support(**settings["support"]),
        [{"x": row["x"], "y": row["y"]} for row in rows],
        [[row["gold"]] for row in rows] if with_gold else None,
    )


def prompting(context: Context) -> Trained:
    return untrained(context, problem_of(context))


def sft(context: Context) -> Trained:
    return train_supervised(context, problem_of(context), context.settings["sft"])


def gflownet(context: Context) -> Trained:
    """From the model, without written middles."""
    return train_gflownet(context, problem_of(context, with_gold=False), context.settings["gflownet"])


def sft_then_gflownet(context: Context) -> Trained:
    """The GFlowNet started from SFT and with written middles in the replay buffer."""
    problem, settings = problem_of(context), context.settings
    start = from_supervised(context, problem, settings["sft"])
    mix = {**settings["gflownet"]["behaviour"], "replay": 0.25}
    mix.pop("policy", None)  # takes the rest
    return train_gflownet(
        context, problem, {**settings["gflownet"], "behaviour": mix}, "gflownet", start=start
    )


def mcmc(base: Posterior, row: Row, n: int, seed: object, settings: Settings) -> tuple[Rollouts, float]:
    assert base.target is not None
    chains = metropolis_hastings(base.policy, base.target, row, seed=seed, **settings)
    return chains.rollouts.select(torch.arange(n) % settings["num_chains"]), math.nan


def smc(base: Posterior, row: Row, n: int, seed: object, settings: Settings) -> tuple[Rollouts, float]:
    assert base.target is not None
    particles = run_smc(base.policy, base.target, row, seed=seed, **settings)
    return particles.resample(n, seed), particles.ess[-1] / settings["num_particles"]


def slow(context: Context, name: str) -> Trained:
    settings = dict(context.settings[name])
    stories = settings.pop("stories")
    run = partial({"mcmc": mcmc, "smc": smc}[name], settings=settings)
    return Trained(Slow(prompting(context).sampler, run, stories))


@dataclass(frozen=True)
class Slow:
    """MCMC or SMC as a sampler, from the prompted model: one run for each of so many stories.

    run: (base, row, n, seed) -> n completions, and their effective share (nan where it has no meaning)
    """

    base: Posterior
    run: Callable[[Posterior, Row, int, object], tuple[Rollouts, float]]
    stories: int


@dataclass(frozen=True)
class Drawn:
    """Samples of N rows, n each: texts [N][n], log_reward [N, n], ess [N] as a share of n."""

    texts: list[list[str]]
    log_reward: Tensor
    ess: list[float]


def draw_slowly(slow: Slow, rows: Sequence[Row], n: int, seed: object) -> Drawn:
    found = [slow.run(slow.base, row, n, seed) for row in rows[: slow.stories]]
    assert slow.base.target is not None
    rewards = [slow.base.target.score_final(rollouts) for rollouts, _ in found]
    texts = [slow.base.texts(rollouts) for rollouts, _ in found]
    return Drawn(texts, torch.stack(rewards), [share for _, share in found])


def draw(posterior: Posterior, rows: Sequence[Row], n: int, seed: object, batch: int = 16) -> Drawn:
    """n samples of every row, and the share of them that importance weights leave effective."""
    assert posterior.target is not None
    texts, rewards, ess = [], [], []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        rollouts, log_q = posterior.policy.sample(part, n, seed=(seed, start))
        log_r = posterior.target.score_final(rollouts).view(len(part), n)
        log_w = log_r.double() - log_q.final(rollouts.lengths).double().view(len(part), n)
        flat = posterior.texts(rollouts)
        texts += [flat[i * n : (i + 1) * n] for i in range(len(part))]
        rewards.append(log_r)
        ess += [effective_sample_size(w) / n for w in log_w]
    return Drawn(texts, torch.cat(rewards), ess)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Metrics on held-out stories; details: samples of five stories; records: every story's mean, for paired tests."""
    settings, sampler, rows = context.settings, trained.sampler, context.data.test
    how = draw_slowly if isinstance(sampler, Slow) else draw
    drawn = how(sampler, rows, settings["samples"], ("evaluate", context.seed))
    per_story = {"log_reward": drawn.log_reward.mean(1).tolist(), "ess": drawn.ess}
    per_story |= text_metrics(drawn.texts, [row["gold"] for row in rows], settings["bertscore"])
    per_story["judge"] = judged(context, drawn.texts, rows)
    metrics = {name: sum(values) / len(values) for name, values in per_story.items()}
    examples = [
        {"x": row["x"], "y": row["y"], "gold": row["gold"], "samples": texts[:4]}
        for row, texts in zip(rows[:5], drawn.texts, strict=False)
    ]
    return Outcome(metrics, {"examples": examples}, per_story)


def text_metrics(
    texts: Sequence[Sequence[str]], gold: Sequence[str], bertscore: bool
) -> dict[str, list[float]]:
    """Each story's mean over its samples of sentence BLEU-4, GLEU-4 (percent) and BERTScore F1 to the gold."""
    from amortlm.lab.metrics.overlap import sentence_bleu, sentence_gleu

    pairs = [
        (text.strip(), reference.strip()) for ts, reference in zip(texts, gold, strict=False) for text in ts
    ]
    unique = list(dict.fromkeys(pairs))  # samples of a sharp posterior repeat
    hypotheses, references = [h for h, _ in unique], [r for _, r in unique]
    scores = {"bleu": sentence_bleu(hypotheses, references), "gleu": sentence_gleu(hypotheses, references)}
    scores["bertscore"] = bert_scorer()(hypotheses, references).f1 if bertscore else [math.nan] * len(unique)
    out = {}
    n = len(texts[0])
    for name, values in scores.items():
        found = dict(zip(unique, values, strict=True))
        flat = [found[pair] for pair in pairs]
        out[name] = [sum(flat[i : i + n]) / n for i in range(0, len(flat), n)]
    return out


@lru_cache(maxsize=1)
def bert_scorer() -> Any:
    from amortlm.lab.metrics.bertscore import BertScorer

    return BertScorer()


def judged(context: Context, texts: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[float]:
    """Share of stories whose first sample a judge prefers to that of the prompted model; nan without a judge.

    settings["judge"]: a model by name or folder, or {"url": ..., "model": ...} of a served one.
    """
    judge_of = context.settings["judge"]
    if judge_of is None:
        return [math.nan] * len(texts)
    from amortlm.lab.metrics.judge import lm_judge, preferences, served_judge

    base = draw(prompting(context).sampler, rows[: len(texts)], 1, ("judge", context.seed))
    judge = (
        served_judge(**judge_of)
        if isinstance(judge_of, dict)
        else lm_judge(LanguageModel.from_pretrained(judge_of))
    )
    contexts = [f"{row['x']} [...] {row['y']}" for row in rows[: len(texts)]]
    return preferences(contexts, [ts[0] for ts in texts], [ts[0] for ts in base.texts], judge)


LABELS = {"log_reward": "log p(zy|x), nats", "bleu": "BLEU-4", "gleu": "GLEU-4"}
PANELS = {"log_reward": "mean log p(zy|x) of a story, nats", "bleu": "mean BLEU-4 of a story"}


def digest(runs: Runs) -> dict[str, Any]:
    """Of the held-out stories, each with its mean over seeds."""
    pairs = [(a, b) for a in ("gflownet", "sft-gflownet") for b in ("prompting", "sft")]
    return {
        "paired": paired_digest(runs, pairs, LABELS),
        "shared": shared_digest(runs, LABELS),
        "boxes": boxes_digest(runs, PANELS),
    }


def summary(results: Results) -> str:
    """Paired tests, GFlowNet methods against the others; and every method on the stories that the slow ones saw."""
    found = results["digest"]
    paired = paired_table(found["paired"], LABELS, "stories")
    return "\n\n".join(filter(None, (paired, shared_table(found["shared"], LABELS, "stories"))))


def figures(results: Results, folder: Path) -> list[str]:
    """Distribution over stories of each method's mean log p(zy|x), and BLEU-4."""
    return box_figure(results["digest"]["boxes"], PANELS, folder / "stories.png")


EXPERIMENT = Experiment(
    name="infilling",
    question="Given the beginning and the ending of a story that training did not see, how likely and how near to the "
    "written sentence are the middles that each method samples?",
    presets=read_presets("infilling"),
    groups={"gflownet": GFNConfig},
    prepare=prepare,
    reads_data=True,
    methods={
        "prompting": prompting,
        "sft": sft,
        "gflownet": gflownet,
        "sft-gflownet": sft_then_gflownet,
        **{name: partial(slow, name=name) for name in ("smc", "mcmc")},
    },
    evaluate=evaluate,
    digest=digest,
    metrics={
        "log_reward": Metric(LABELS["log_reward"], ".2f", "higher", "mean over held-out stories and samples"),
        "bleu": Metric(
            "BLEU-4", ".1f", "higher", "sentence BLEU to the sentence as written (sacrebleu), mean"
        ),
        "gleu": Metric("GLEU-4", ".1f", "higher", "sentence GLEU to the sentence as written (nltk), mean"),
        "bertscore": Metric("BERTScore F1", ".3f", "higher", "all-MiniLM-L6-v2, no idf, not rescaled"),
        "judge": Metric(
            "judge", ".2f", "higher", "share preferred to prompting by a judge; needs the setting `judge`"
        ),
        "ess": Metric(
            "ESS", ".3f", "higher", "effective share of the samples as a proposal; SMC: of its particles"
        ),
    },
    figures=figures,
    summary=summary,
    paper={
        "prompting": {"bertscore": "0.081", "bleu": "1.3", "gleu": "3.2"},
        "SFT": {"bertscore": "0.094", "bleu": "1.6", "gleu": "3.7"},
        "GFlowNet": {"bertscore": "0.184", "bleu": "2.1", "gleu": "4.2"},
    },
    paper_setting="GPT-2 Large fine-tuned on 50,000 ROCStories, 900 training stories; its BERTScore is rescaled",
)
