"""Predicting y from samples of z: the posterior predictive, and votes over generated answers.

Hu et al. 2024, section 3.2: y is predicted from the mean of p(y | x z) over z ~ q(z | x), or by a vote. The target
must be one `log_prob` with text after `{z}`, such as `lm.log_prob("{z} The answer is {y}.", given="{x}")`. The column
in that text is predicted; the policy's prompt and `given` may not contain it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amortlm.engine.decoding import Exploration, decode
from amortlm.engine.model import CausalLM
from amortlm.engine.prefix import Prefix
from amortlm.errors import ConfigError, DataError
from amortlm.inference.correct import check_n
from amortlm.policy.policy import Policy
from amortlm.support.law import SupportLaw
from amortlm.support.spec import Support
from amortlm.targets.base import Scoring, Target
from amortlm.targets.lm import LogProb
from amortlm.text.template import Template
from amortlm.types import Rollouts, Row

ROWS = 16  # rows at a time
Text = tuple[int, tuple[int, ...]]  # (row number, tokens from the start of z)


@dataclass(frozen=True)
class Prediction:
    """p(y | x) over given answers, estimated from n samples of z.

    answers  the given answers
    probs    probability of each answer, normalised over the answers; they sum to 1
    errors   the Monte-Carlo standard errors of `probs`; NaN for n = 1
    mass     sum over the answers of the mean p(y | x z): their probability before normalisation
    n        number of samples of z
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
    """Votes for each answer.

    counts   answer -> votes, the most frequent answer first
    n        number of votes
    best     the most frequent answer; share: its share of the votes; error: the standard error of that share
    """

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
    policy: Policy,
    target: Target | None,
    rows: Sequence[Row],
    answers: Sequence[str],
    n: int,
    *,
    temperature: float,
    seed: object,
) -> list[Prediction]:
    """The predictions of `rows`; see `Posterior.predict`."""
    term, (_, column, _) = _answer(policy, target)
    likelihood = _likelihood(term)
    if len(answers) == 0:
        raise DataError("predict needs at least one answer")
    out: dict[int, Prediction] = {}
    for index in _by_length(policy, rows):
        rollouts = _sample(policy, [rows[i] for i in index], n, temperature, seed)
        log_p = _score(likelihood, rollouts, column, answers)
        for k, i in enumerate(index):
            out[i] = _prediction(answers, log_p[:, rollouts.row_index == k])
    return [out[i] for i in range(len(rows))]


def vote(
    policy: Policy,
    target: Target | None,
    rows: Sequence[Row],
    n: int,
    *,
    temperature: float,
    max_tokens: int,
    seed: object,
) -> list[Votes]:
    """The votes of `rows`; see `Posterior.vote`. The model writes an answer greedily after the text before the column,
    and stops at the first token of the text after the column, or after `max_tokens` tokens."""
    term, (lead, _, tail) = _answer(policy, target)
    lm = term.lm
    lead_ids = lm.encode_continuation(lead.rstrip(" "))  # the space belongs to the answer's first token
    tail_ids = lm.encode_continuation(tail)
    end = lm.tokenizer.eos_token_id if not tail_ids else tail_ids[0]
    support = Support(stop=end, min_tokens=1, max_tokens=max_tokens).bind(lm)
    out = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        rollouts = _sample(policy, part, n, temperature, seed)
        texts = _up_to_answer(rollouts, lead_ids)
        answers = _continued(term, part, list(dict.fromkeys(texts)), support)
        counts = [Counter[str]() for _ in part]
        for text in texts:
            counts[text[0]][answers[text]] += 1
        out += [Votes(dict(c.most_common()), n) for c in counts]
    return out


@torch.no_grad()
def _continued(term: LogProb, rows: Sequence[Row], texts: list[Text], support: SupportLaw) -> dict[Text, str]:
    """What the model writes greedily after each text. The prompt of a row is encoded once for all its texts."""
    prompts, passes = [_asked(term, row) for row in rows], term.lm.passes
    out: dict[Text, str] = {}
    for block in passes.blocks(prompts):
        mine = [text for text in texts if block.start <= text[0] < block.stop]
        asked = passes.encode(prompts[block])
        tokens = max((len(text) for _, text in mine), default=0) + support.max_tokens
        size = passes.fit(passes.written_bytes(asked.longest, tokens, kept=True), asked.held)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            out |= zip(part, _written(term.lm, asked, block.start, part, support), strict=True)
        del asked  # before the next are encoded
    return out


def _written(lm: CausalLM, asked: Prefix, first: int, texts: list[Text], support: SupportLaw) -> list[str]:
    """Greedy answers after each text; the prompt of row `first` is the first of `asked`."""
    index = torch.arange(len(texts), device=lm.device)
    row = torch.tensor([row - first for row, _ in texts], device=lm.device)
    prefix = lm.passes.extend(asked, row, [text for _, text in texts])
    uniforms = torch.full((len(texts), support.max_tokens + 1), 0.5, device=lm.device)
    greedy = Exploration(torch.zeros(len(texts), device=lm.device))
    drawn = decode(lm.passes, support, prefix, index, uniforms, greedy)
    pairs = zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    return [lm.decode(z[:k]).strip() for z, k in pairs]


def _answer(policy: Policy, target: Target | None) -> tuple[LogProb, tuple[str, str, str]]:
    """The target's one log_prob term, and (lead, column, tail): the column after `{z}`, and the text before and after
    this column. Raises ConfigError for another target, or if the prompt shows the column."""
    terms = target.terms if target is not None else []
    if len(terms) != 1 or not isinstance(term := terms[0][1], LogProb) or not term.of.has_latent:
        raise ConfigError(
            "a prediction needs a target that is one log_prob with `{z}` and an answer after it in `of`, "
            f"not {target!r}"
        )
    after = Template(term.of.around[1])
    if len(after.fields) != 1:
        raise ConfigError(f"{term!r}: the text after {{z}} must contain one column, the answer to predict")
    column = after.fields[0]
    shown = policy.prompt.columns | term.given.columns
    if column in shown:
        raise ConfigError(
            f"the policy's prompt or the target's `given` contains {{{column}}}, the answer to predict; take it out"
        )
    first = next(i for i, (_, field) in enumerate(after.parts) if field)
    tail = "".join(literal for literal, _ in after.parts[first + 1 :])
    return term, (after.parts[first][0], column, tail)


def _likelihood(term: LogProb) -> LogProb:
    """log p(y | x z) of a term log p(z y | x)."""
    before, after = term.of.around
    if not isinstance(term.given.source, str):
        raise ConfigError(
            f"{term!r}: predict needs `given` as text, because z follows it; vote() also takes messages"
        )
    return LogProb(term.lm, after, term.given.source + before + "".join(f"{{{z}}}" for z in term.of.latents))


def _sample(policy: Policy, rows: Sequence[Row], n: int, temperature: float, seed: object) -> Rollouts:
    check_n(n)
    heat = None
    if temperature != 1.0:
        heat = Exploration(torch.full((n * len(rows),), float(temperature), device=policy.device))
    return policy.sample(rows, n, seed=seed, exploration=heat)[0]


def _score(likelihood: LogProb, rollouts: Rollouts, column: str, answers: Sequence[str]) -> Tensor:
    """[A, B] log p of each answer after each completion, nats. Equal completions of a row are scored once, and all
    answers share the pass over prompt and z."""
    keys = [
        (i, s, *z)
        for i, s, z in zip(
            rollouts.row_index.tolist(), rollouts.stops.tolist(), rollouts.completions(), strict=True
        )
    ]
    first = {key: b for b, key in reversed(list(enumerate(keys)))}
    unique = sorted(first.values())
    final = rollouts.final_only()
    size = likelihood.at_once(Scoring(_answered(final, column, max(answers, key=len))))
    parts = torch.tensor(unique).split(size)
    found = torch.cat(
        [_score_chunk(likelihood, final.select(part), column, answers) for part in parts], dim=1
    )
    place = {b: k for k, b in enumerate(unique)}
    return found[:, [place[first[key]] for key in keys]]


@torch.no_grad()
def _score_chunk(likelihood: LogProb, rollouts: Rollouts, column: str, answers: Sequence[str]) -> Tensor:
    scoring, out = Scoring(rollouts), []
    for answer in answers:
        asked = _answered(rollouts, column, answer)
        log_p = likelihood.score_batch(scoring.sharing(asked))
        out.append(log_p.gather(1, asked.lengths[:, None].to(log_p.device)).squeeze(1).double().cpu())
    return torch.stack(out)


def _answered(rollouts: Rollouts, column: str, answer: str) -> Rollouts:
    """The same with an answer in each row."""
    return replace(rollouts, rows=[{**row, column: answer} for row in rollouts.rows])


def _by_length(policy: Policy, rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers in batches of similar prompt length, because padding costs as much as text."""
    lengths = [len(prompt) for prompt in policy.encode_rows(rows)]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]


def _prediction(answers: Sequence[str], log_p: Tensor) -> Prediction:
    """The prediction from log_p [A, n]: log p(y | x z) of each answer after each z, nats."""
    p = log_p.exp()
    mass = p.mean(1).sum()
    probs = (log_p.logsumexp(1)).softmax(0)
    # Delta method for a ratio of means: the residual of p(y | xz) - prob * (sum over answers).
    residual = (p - probs[:, None] * p.sum(0)) / mass.clamp_min(1e-300)
    n = p.shape[1]
    errors = (residual.var(1) / n).sqrt() if n > 1 else torch.full_like(probs, math.nan)
    return Prediction([*answers], probs.tolist(), errors.tolist(), mass.item(), n)


def _asked(term: LogProb, row: Row) -> list[int]:
    """The tokens before z."""
    blank = dict.fromkeys(Template(term.of.around[1]).columns, "")  # the columns after z are not read
    before = term.of.split({**row, **blank})[0]
    return [*term.lm.encode_prompt(term.given, row), *term.lm.encode_continuation(before)]


def _up_to_answer(rollouts: Rollouts, lead: Sequence[int]) -> list[Text]:
    """For each trajectory: its row, and its tokens from the start of z up to the answer."""
    written = zip(rollouts.row_index.tolist(), rollouts.completions(), rollouts.stops.tolist(), strict=True)
    return [(i, (*z, stop, *lead)) for i, z, stop in written]
