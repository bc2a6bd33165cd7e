"""What a posterior over z says about y: the posterior predictive, and votes over generated answers.

Hu et al. 2024, section 3.2: y is predicted from the average over z ~ q(z | x) of p(y | x z), or by a vote. The
target must be one `log_prob` with text after `{z}`, such as `lm.log_prob("{z} The answer is {y}.", given="{x}")`;
the column in that text is what is predicted, and the policy's prompt may not show it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amortlm.data import rows_or_row
from amortlm.engine.decoding import Exploration, decode
from amortlm.errors import ConfigError, DataError
from amortlm.support.spec import Support
from amortlm.targets.base import Scoring
from amortlm.targets.lm import LogProb
from amortlm.text.template import Template
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.posterior import Posterior

ROWS = 16  # rows at a time


@dataclass(frozen=True)
class Prediction:
    """p(y | x) over given answers, estimated from n samples of z.

    probs  the A answers' probabilities, normalised among them; errors  their Monte-Carlo standard errors;
    mass   mean over z of the summed p(y | x z) of these answers: what they hold of all possible texts
    """

    answers: list[str]
    probs: list[float]
    errors: list[float]
    mass: float
    n: int

    @property
    def best(self) -> str:
        return self.answers[max(range(len(self.answers)), key=self.probs.__getitem__)]


@dataclass(frozen=True)
class Votes:
    """Answers by number of votes, most first; share: that of the first, error: its standard error."""

    counts: dict[str, int]
    n: int

    @property
    def best(self) -> str:
        return next(iter(self.counts))

    @property
    def share(self) -> float:
        return self.counts[self.best] / self.n

    @property
    def error(self) -> float:
        return math.sqrt(self.share * (1 - self.share) / self.n)


def predict(
    posterior: Posterior,
    rows: Sequence[Row],
    answers: Sequence[str],
    n: int = 16,
    *,
    temperature: float = 1.0,
    seed: object = 0,
) -> list[Prediction]:
    """p(y | x) = E[p(y | x z)] over z ~ q(z | x) for each row and answer, from n samples of z; at temperature 0 z is
    the greedy one, token by token."""
    target, (_, column, _) = _answer(posterior)
    likelihood = _likelihood(target)
    if len(answers) == 0 or n < 1:
        raise DataError("predict needs at least one answer to compare, and n of at least 1")
    rows = rows_or_row(rows)
    out: dict[int, Prediction] = {}
    for index in _by_length(posterior, rows):
        rollouts = _sample(posterior, [rows[i] for i in index], n, temperature, seed)
        log_p = _score(likelihood, rollouts, column, answers)
        for k, i in enumerate(index):
            out[i] = _prediction(answers, log_p[:, rollouts.row_index == k])
    return [out[i] for i in range(len(rows))]


def vote(
    posterior: Posterior,
    rows: Sequence[Row],
    n: int = 10,
    *,
    temperature: float = 1.0,
    max_tokens: int = 8,
    seed: object = 0,
) -> list[Votes]:
    """The frozen model's greedy answers after each of n samples of z, counted.

    An answer is what the model writes between the text before and after the column, in at most `max_tokens`.
    """
    target, (lead, _, tail) = _answer(posterior)
    rows, lm = rows_or_row(rows), target.lm
    lead_ids = lm.encode_continuation(lead.rstrip(" "))  # the space belongs to the answer's first token
    tail_ids = lm.encode_continuation(tail)
    end = lm.tokenizer.eos_token_id if not tail_ids else tail_ids[0]
    support = Support(stop=end, min_tokens=1, max_tokens=max_tokens).bind(lm)
    out = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        rollouts = _sample(posterior, part, n, temperature, seed)
        # Answers to equal texts are equal: each text is continued once, its prompt encoded once for all of them.
        texts = _up_to_answer(rollouts, lead_ids)
        unique = list(dict.fromkeys(texts))
        with torch.no_grad():
            asked = lm.passes.encode([_asked(target, row) for row in part])
            row_of = torch.tensor([row for row, _ in unique], device=lm.device)
            prefix = lm.passes.extend(asked, row_of, [text for _, text in unique])
            index = torch.arange(len(unique), device=lm.device)
            uniforms = torch.full((len(unique), max_tokens + 1), 0.5, device=lm.device)
            greedy = Exploration(torch.zeros(len(unique), device=lm.device))
            drawn = decode(lm.passes, support, prefix, index, uniforms, greedy)
        written = zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
        answers = {q: lm.decode(z[:k]).strip() for q, (z, k) in zip(unique, written, strict=True)}
        for i in range(len(part)):
            mine = (rollouts.row_index == i).nonzero().squeeze(1).tolist()
            out.append(Votes(dict(Counter(answers[texts[j]] for j in mine).most_common()), len(mine)))
    return out


def _answer(posterior: Posterior) -> tuple[LogProb, tuple[str, str, str]]:
    """The target's one log_prob term, and (lead, column, tail): the text around the column after `{z}`."""
    terms = posterior.target.terms if posterior.target is not None else []
    if len(terms) != 1 or not isinstance(term := terms[0][1], LogProb) or not term.of.has_latent:
        raise ConfigError(
            "a prediction needs a target that is one log_prob with `{z}` and an answer after it in `of`, "
            f"not {posterior.target!r}"
        )
    after = Template(term.of.around[1])
    if len(after.fields) != 1:
        raise ConfigError(f"{term!r}: the text after {{z}} must hold one column, the answer to predict")
    column = after.fields[0]
    shown = posterior.policy.prompt.columns | term.given.columns
    if column in shown:
        raise ConfigError(
            f"the policy's prompt or the target's `given` shows {{{column}}}, the answer to predict; take it out"
        )
    first = next(i for i, (_, field) in enumerate(after.parts) if field)
    tail = "".join(literal for literal, _ in after.parts[first + 1 :])
    return term, (after.parts[first][0], column, tail)


def _likelihood(target: LogProb) -> LogProb:
    """log p(y | x z) of a target log p(z y | x)."""
    before, after = target.of.around
    if not isinstance(target.given.source, str):
        raise ConfigError(
            f"{target!r}: predict needs `given` as text, since z follows it; vote() takes messages"
        )
    return LogProb(
        target.lm, after, target.given.source + before + "".join(f"{{{z}}}" for z in target.of.latents)
    )


def _sample(posterior: Posterior, rows: Sequence[Row], n: int, temperature: float, seed: object) -> Rollouts:
    heat = None
    if temperature != 1.0:
        heat = Exploration(torch.full((n * len(rows),), float(temperature), device=posterior.policy.device))
    return posterior.policy.sample(rows, n, seed=seed, exploration=heat)[0]


def _score(likelihood: LogProb, rollouts: Rollouts, column: str, answers: Sequence[str]) -> Tensor:
    """[A, B] log p of each answer after each distinct text; all answers share the pass over prompt and z."""
    keys = [
        (i, s, *z)
        for i, s, z in zip(
            rollouts.row_index.tolist(), rollouts.stops.tolist(), rollouts.completions(), strict=True
        )
    ]
    first = {key: b for b, key in reversed(list(enumerate(keys)))}
    unique = sorted(first.values())
    found = torch.cat(
        [
            _score_chunk(likelihood, rollouts.final_only().select(part), column, answers)
            for part in torch.tensor(unique).split(max(1, likelihood.rows_per_chunk(rollouts)))
        ],
        dim=1,
    )
    place = {b: k for k, b in enumerate(unique)}
    return found[:, [place[first[key]] for key in keys]]


@torch.no_grad()
def _score_chunk(likelihood: LogProb, rollouts: Rollouts, column: str, answers: Sequence[str]) -> Tensor:
    scoring, out = Scoring(rollouts), []
    for answer in answers:
        asked = replace(rollouts, rows=[{**row, column: answer} for row in rollouts.rows])
        log_p = likelihood.score_batch(scoring.sharing(asked))
        out.append(log_p.gather(1, asked.lengths[:, None].to(log_p.device)).squeeze(1).double().cpu())
    return torch.stack(out)


def _by_length(posterior: Posterior, rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers in batches of prompts of similar length: padding costs as much as text."""
    lengths = [len(prompt) for prompt in posterior.policy.encode_rows(rows)]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]


def _prediction(answers: Sequence[str], log_p: Tensor) -> Prediction:
    """log_p [A, n]: log p(y | x z) of each answer after each z."""
    p = log_p.exp()
    mass = p.mean(1).sum()
    probs = (log_p.logsumexp(1)).softmax(0)
    # Delta method for a ratio of means: the residual of p(y | xz) - prob * (sum over answers).
    residual = (p - probs[:, None] * p.sum(0)) / mass.clamp_min(1e-300)
    n = p.shape[1]
    errors = (residual.var(1) / n).sqrt() if n > 1 else torch.full_like(probs, math.nan)
    return Prediction([*answers], probs.tolist(), errors.tolist(), mass.item(), n)


def _asked(target: LogProb, row: Row) -> list[int]:
    """Tokens before z."""
    before = target.of.split({**row, **_blank(target)})[0]
    return [*target.lm.encode_prompt(target.given, row), *target.lm.encode_continuation(before)]


def _up_to_answer(rollouts: Rollouts, lead: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The row of each trajectory, and its tokens from z up to where the answer starts."""
    written = zip(rollouts.row_index.tolist(), rollouts.completions(), rollouts.stops.tolist(), strict=True)
    return [(i, (*z, stop, *lead)) for i, z, stop in written]


def _blank(target: LogProb) -> dict[str, str]:
    """Values for the columns after `{z}`, which are not read."""
    return dict.fromkeys(Template(target.of.around[1]).columns, "")
