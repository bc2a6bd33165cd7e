"""The next sentence (Hu et al. 2024, section 4.2): likely and yet different continuations of prompts never seen.

z = the next sentence, R(z) = p(z | x)^(1/T). Methods give the same number of completions per prompt. Two figures are
compared: the log-likelihood of the best completion of a prompt, and the diversity among its completions. Decoders have
a grid of settings, and also run at a multiple of the compute; the GFlowNet runs at several T. "resampling" is
importance resampling of many samples: what a perfect sampler of the posterior would reach, at more cost than a decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from amortlm.errors import DataError
from amortlm.lab.baselines.decoding import decode_counted
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Settings, Trained
from amortlm.lab.experiments.frontier import figures, summary
from amortlm.lab.metrics.embedding import Encoder, encoder_folder, grouped_diversity, sentence_encoder
from amortlm.lab.overrides import read_presets
from amortlm.lab.tasks.infilling import STORIES
from amortlm.lab.training import Problem, Split, train_gflownet, untrained
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.support import Support
from amortlm.train import GFNConfig
from amortlm.types import Rollouts, Row

PROMPT = "{x}"
DECODERS = ("temperature", "nucleus", "top_k", "greedy", "beam", "diverse_beam", "best_of_n", "resampling")
TEMPERATURES = (0.8, 0.85, 0.9, 0.95)
FILES = ("train_head.txt", "prompts.txt")  # looked for where --data is a folder
STORY_END = "<|endoftext|>"


@dataclass(frozen=True)
class Decoder:
    """A decoding method with its grid. base: the untrained model; multiples: of the number of samples."""

    base: Posterior
    method: str
    grid: list[dict[str, Any]]
    multiples: list[int]


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> Split:
    """Prompts as rows with a column x: sentences that open the stories of --data (divided by <|endoftext|>) or its
    lines; without it the beginnings of our own stories. Raises DataError, MissingExtraError."""
    encoder_folder(settings["encoder"])
    texts = _texts(data, settings["sentences"])
    kept = [x for x in dict.fromkeys(texts) if len(lm.encode_start(x)) <= settings["max_prompt_tokens"]]
    n = settings["test_prompts"]
    train = kept[n : n + settings["train_prompts"]]
    # Our own stories are few: any number beyond the held-out ones will do.
    if not train or (data is not None and len(train) < settings["train_prompts"]):
        raise DataError(
            f"{data or 'our own stories'}: {len(kept)} prompts of at most {settings['max_prompt_tokens']} tokens, but "
            f"test_prompts={n} and train_prompts={settings['train_prompts']} are needed; lower these or give more data"
        )
    return Split([{"x": x} for x in train], [{"x": x} for x in kept[:n]])


def _texts(data: Path | None, sentences: int) -> list[str]:
    if data is None:
        return [str(row["x"]) for row in STORIES]
    file = next((data / name for name in FILES if (data / name).is_file()), data)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{data}: cannot read prompts ({e}); give a text file, or a folder with {FILES}"
        ) from e
    if STORY_END not in text:
        return [line.strip() for line in text.splitlines() if line.strip()]
    openings = [opening(story, sentences) for story in text.split(STORY_END)]
    return [x for x in openings if x]


def opening(story: str, sentences: int) -> str | None:
    """The first sentences of a story, or None if no more follow or the last one is no plain statement."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(story.split()))
    if len(found) <= sentences or not re.fullmatch(r"[\w ,'-]+\.", found[sentences - 1]):
        return None
    return " ".join(found[:sentences])


def problem_of(context: Context) -> Problem:
    target = context.lm.log_prob("{z}", given=PROMPT)
    return Problem(target, PROMPT, Support(**context.settings["support"]), context.data.train)


def decoder(context: Context, method: str) -> Trained:
    base = untrained(context, problem_of(context)).sampler
    once = method in ("greedy", "best_of_n", "resampling")  # one result, or an n of their own
    multiples = [1] if once else [1, context.settings["compute"]]
    return Trained(Decoder(base, method, context.settings["grids"][method], multiples))


def gflownet(context: Context, temperature: float) -> Trained:
    problem, config = problem_of(context), dict(context.settings["gflownet"])
    if context.settings["anneal"]:  # p(z | x) at the first update, p(z | x)^(1/T) at the last
        config["reward_temperature"] = (1 / temperature, 1.0, config["max_steps"])
    return train_gflownet(context, replace(problem, target=problem.target / temperature), config)


def evaluate(context: Context, trained: Trained) -> Outcome:
    """Every point of the method on held-out prompts, and at one times the compute on training prompts too.

    The method's figures are those of the setting with the best max log-likelihood on training prompts.
    """
    data, measured = context.data, context.settings["train_prompts_measured"]
    points = [
        {"split": split, **point}
        for split, rows in (("train", data.train[:measured]), ("test", data.test))
        for point in _points(context, trained.sampler, rows, split == "test")
    ]
    chosen = max((p for p in points if p["split"] == "train"), key=lambda p: p["max_ll"])
    held_out = [p for p in points if p["split"] == "test" and p["setting"] == chosen["setting"]]
    one, more = held_out[0], held_out[-1]
    has_more = more["compute"] == context.settings["compute"]
    metrics = {name: one[name] for name in ("max_ll", "mean_ll", "diversity")}
    for name in ("max_ll", "diversity"):
        metrics[f"{name}_more"] = more[name] if has_more else math.nan
        metrics[f"{name}_train"] = chosen[name]
    return Outcome(metrics, {"chosen": chosen["setting"], "points": points})


def _points(
    context: Context, sampler: Decoder | Posterior, rows: Sequence[Row], with_more: bool
) -> Iterator[dict[str, Any]]:
    """Setting, compute and figures. with_more: of decoders also at more compute."""
    k = context.settings["num_samples"]
    if isinstance(sampler, Posterior):
        rollouts, _ = sampler.policy.sample(rows, k, seed=("evaluate", context.seed))
        passes = int((rollouts.lengths + 1).sum())
        yield {"setting": {}, "compute": 1, **_measure(context, sampler, rollouts, passes)}
        return
    base, method = sampler.base, sampler.method
    for setting in sampler.grid:
        for multiple in sampler.multiples if with_more else [1]:
            count = 1 if method == "greedy" else k * multiple
            decoded = decode_counted(base.policy, rows, method, count, seed=context.seed, **setting)
            found = _measure(context, base, decoded.rollouts, decoded.token_passes)
            yield {"setting": setting, "compute": multiple * setting.get("n", 1), **found}


def _measure(context: Context, posterior: Posterior, rollouts: Rollouts, passes: int) -> dict[str, float]:
    """Means over prompts. The log-likelihood is log p(z | x) of the frozen model, stop symbol included, in nats."""
    n = len(rollouts.rows)
    log_p = problem_of(context).target.score_final(rollouts).view(n, -1)
    texts = posterior.texts(rollouts)
    k = len(texts) // n
    groups = [texts[i : i + k] for i in range(0, len(texts), k)]
    diversity = grouped_diversity(groups, _encoder(context.settings["encoder"]))
    return {
        "max_ll": log_p.amax(1).mean().item(),
        "mean_ll": log_p.mean().item(),
        "diversity": sum(diversity) / n,
        "length": rollouts.lengths.float().mean().item(),
        "token_passes": passes,
    }


@lru_cache(maxsize=1)
def _encoder(folder: str | None) -> Encoder:
    return sentence_encoder(folder)


EXPERIMENT = Experiment(
    name="continuation",
    question="On prompts never seen, are a GFlowNet's next sentences both likelier and more diverse than those of "
    "decoding strategies, at equal numbers of samples and against more compute?",
    presets=read_presets("continuation"),
    groups={"gflownet": GFNConfig},
    prepare=prepare,
    reads_data=True,
    methods={
        **{name.replace("_", "-"): partial(decoder, method=name) for name in DECODERS},
        **{f"gflownet-{t:g}": partial(gflownet, temperature=t) for t in TEMPERATURES},
    },
    evaluate=evaluate,
    metrics={
        "max_ll": Metric(
            "max log p",
            ".2f",
            "higher",
            "log p(z|x) of the best completion, nats, mean over held-out prompts",
        ),
        "mean_ll": Metric(
            "mean log p", ".2f", None, "log p(z|x), mean over all completions of held-out prompts"
        ),
        "diversity": Metric(
            "diversity", ".3f", "higher", "1 - mean pairwise cosine of sentence embeddings, held-out prompts"
        ),
        "max_ll_more": Metric(
            "max log p, more compute", ".2f", "higher", "with `compute` times the samples or beams"
        ),
        "diversity_more": Metric("diversity, more compute", ".3f", "higher", "among these"),
        "max_ll_train": Metric(
            "max log p, train",
            ".2f",
            "higher",
            "on training prompts; decoders: their setting is the best by this figure",
        ),
        "diversity_train": Metric("diversity, train", ".3f", "higher", "on training prompts"),
    },
    figures=figures,
    summary=summary,
    paper={},
    paper_setting="GPT-2 XL 1.5B, 1,000 prompts, LoRA r = 64; the paper shows a plot (figure 3), no figures: the "
    "GFlowNet has a higher max log-likelihood at higher diversity than every decoder, also when these get 5x compute",
)
