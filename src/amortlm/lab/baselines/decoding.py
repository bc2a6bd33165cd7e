"""Decoding strategies that the amortised sampler is compared with: same prompts, same support, same `Rollouts`.

`transformers.generate` does the sampling, greedy and beam search. The support is imposed before anything else looks
at the logits, so temperature, nucleus and top-k act on q, the model renormalised on the support. Diverse beam search
(Vijayakumar et al. 2016) is written here, since transformers 5 has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig

from amortlm.data import as_rows
from amortlm.engine.decoding import Frontier
from amortlm.engine.generation import generate
from amortlm.errors import ConfigError, nearest
from amortlm.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Rollouts, Row

METHODS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "nucleus": {"top_p": 0.9, "temperature": 1.0},
    "top_k": {"top_k": 50, "temperature": 1.0},
    "best_of_n": {"n": 5, "temperature": 1.0, "score": None},
    "resampling": {"n": 16, "temperature": 1.0, "score": None},
    "greedy": {},
    "beam": {"num_beams": None},
    "diverse_beam": {"num_groups": None, "penalty": 1.0},
}
# generate() fills what is unset from its own defaults (top_k=50) and the checkpoint's generation_config.json.
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "use_cache": True}
NEUTRAL_SAMPLING = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# Beams are ranked by log q, not by log q per token.
NEUTRAL_BEAMS = {"do_sample": False, "length_penalty": 0.0, "early_stopping": False}


@dataclass(frozen=True)
class Decoded:
    """rollouts: num_samples completions per row, in row order, searches best first.

    token_passes: completion tokens that went through the model. Sequences that have ended count until their batch ends;
    prompts, and what best_of_n and resampling score, do not count; beams that begin alike count once.
    """

    rollouts: Rollouts
    token_passes: int


def decode(
    policy: Policy, rows: Sequence[Row], method: str, num_samples: int, *, seed: object = 0, **settings: Any
) -> Rollouts:
    """The completions of `decode_counted`."""
    return decode_counted(policy, rows, method, num_samples, seed=seed, **settings).rollouts


@torch.no_grad()
def decode_counted(
    policy: Policy, rows: Sequence[Row], method: str, num_samples: int, *, seed: object = 0, **settings: Any
) -> Decoded:
    """num_samples completions of each row by one of `METHODS`, whose entries are its settings and their defaults.

    temperature, nucleus, top_k   sampling; the same call draws the same completions
    best_of_n     each completion is the best of n sampled ones, by `score` (a Target; default: log q)
    resampling    importance resampling of n * num_samples completions of q, with replacement: near the posterior
                  exp(score) (default: q(z)^(1 / temperature), tempered as a whole) where n is large enough
    greedy        the likeliest token at every step: num_samples must be 1
    beam          the num_samples best of `num_beams` (default: num_samples) beams
    diverse_beam  `num_groups` (default: num_samples) groups of beams; `penalty`: nats for each beam of an earlier
                  group that has the token at this step (Hamming diversity)

    The searches treat "one of the stop symbols" as one event, and report the first symbol. Raises ConfigError.
    """
    rows = as_rows(rows, "rows")
    settings = _settings(policy, method, num_samples, settings)
    with _seeded(policy.device, seed):
        if method == "best_of_n":
            return _best_of_n(policy, rows, num_samples, **settings)
        if method == "resampling":
            return _resampling(policy, rows, num_samples, **settings)
        if method == "diverse_beam":
            return _diverse_beams(policy, rows, num_samples, **settings)
        return _generate(policy, rows, method, num_samples, settings)


def _settings(policy: Policy, method: str, num_samples: int, given: dict[str, Any]) -> dict[str, Any]:
    """The method's settings, with its defaults. Raises ConfigError."""
    if method not in METHODS:
        raise ConfigError(f"unknown decoding method {method!r}; {nearest(method, METHODS)}")
    unknown = sorted(set(given) - set(METHODS[method]))
    if unknown:
        raise ConfigError(f"{method} has no setting {unknown[0]!r}; {nearest(unknown[0], METHODS[method])}")
    settings = METHODS[method] | given
    for name in ("num_beams", "num_groups"):
        if name in settings:
            settings[name] = settings[name] or num_samples
    wrong = _why_not(policy, method, num_samples, settings)
    if wrong:
        raise ConfigError(wrong)
    return settings


def _why_not(policy: Policy, method: str, n: int, settings: dict[str, Any]) -> str | None:
    """Why a policy cannot be decoded so, if it cannot."""
    if policy.support.tool is not None:
        return "decoding methods run no tools: give a policy whose support has none"
    if not policy.sharing.steps and method != "diverse_beam":
        return (
            f"{policy.lm.name} cannot go on from a padded, cached prompt exactly, which generate() does; "
            "use policy.sample or 'diverse_beam'"
        )
    if n < 1 or (method == "greedy" and n > 1):
        return f"{method} cannot give {n} completions per row: ask for 1 (or more, if not greedy)"
    if not 0 < settings.get("temperature", 1.0) < float("inf") or not 0 < settings.get("top_p", 1.0) <= 1:
        return f"{settings}: need temperature > 0 and 0 < top_p <= 1; for temperature 0 use 'greedy'"
    if settings.get("top_k", 1) < 1 or settings.get("n", 1) < 1:
        return f"{settings}: top_k and n must be at least 1"
    if settings.get("num_beams", n) < n:
        return f"num_beams={settings['num_beams']} cannot give {n} completions"
    if n % settings.get("num_groups", n):
        return f"num_groups={settings['num_groups']} must divide num_samples={n}"
    return None


@contextmanager
def _seeded(device: torch.device, seed: object) -> Iterator[None]:
    """generate() draws from torch's global generator: seed it, and put it back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed))
        yield


def _generate(
    policy: Policy, rows: Sequence[Row], method: str, num_samples: int, settings: dict[str, Any]
) -> Decoded:
    sampled = method in ("temperature", "nucleus", "top_k")
    width = max(num_samples, settings.get("num_beams", 1))
    neutral = NEUTRAL_SAMPLING if sampled else NEUTRAL_BEAMS if width > 1 else {"do_sample": False}
    config = GenerationConfig(
        **NEUTRAL
        | neutral
        | settings
        | {
            "num_return_sequences": num_samples,
            "max_new_tokens": policy.support.max_tokens + 1,
        }
    )
    prompts, found, passes = policy.encode_rows(rows), [], 0
    longest = max(len(prompt) for prompt in prompts)
    # generate() makes copies of a prompt before it encodes them; beside the logits stand log q and sorted copies.
    each = policy.passes.sizes.text(longest, past=policy.support.max_tokens + 1, logits=1, extra=4 * 4)
    chunk = policy.passes.fit(width * each)
    for start in range(0, len(rows), chunk):
        part = generate(policy.passes, policy.support, prompts[start : start + chunk], config, not sampled)
        found += part.completions
        passes += part.token_passes
    groups = _split(found, num_samples)
    if method == "beam" and any(len(set(map(tuple, group))) < num_samples for group in groups):
        _too_few(num_samples)
    return Decoded(policy.rollouts(rows, groups), passes)


def _best_of_n(
    policy: Policy, rows: Sequence[Row], num_samples: int, n: int, temperature: float, score: Target | None
) -> Decoded:
    drawn = _generate(policy, rows, "temperature", num_samples * n, {"temperature": temperature})
    rollouts = drawn.rollouts
    if score is None:
        values = policy.evaluate(rollouts).final(rollouts.lengths)
    else:
        values = score.score_final(rollouts)
    best = values.view(-1, n).argmax(1).to(rollouts.lengths.device)
    return Decoded(
        rollouts.select(best + n * torch.arange(len(best), device=best.device)), drawn.token_passes
    )


def _resampling(
    policy: Policy, rows: Sequence[Row], num_samples: int, n: int, temperature: float, score: Target | None
) -> Decoded:
    drawn = _generate(policy, rows, "temperature", num_samples * n, {"temperature": 1.0})
    rollouts = drawn.rollouts
    log_q = policy.evaluate(rollouts).final(rollouts.lengths).view(len(rows), -1)
    if score is None:  # relative to the likeliest of the row: no temperature overflows
        log_r = (log_q - log_q.amax(1, keepdim=True)) / temperature
    else:
        log_r = score.score_final(rollouts).to(log_q.device).view_as(log_q)
    weights = (log_r - log_q).softmax(1)
    picked = torch.multinomial(weights, num_samples, replacement=True)
    first = torch.arange(len(rows), device=picked.device)[:, None] * weights.shape[1]
    return Decoded(rollouts.select((first + picked).flatten()), drawn.token_passes)


def _diverse_beams(
    policy: Policy, rows: Sequence[Row], num_samples: int, num_groups: int, penalty: float
) -> Decoded:
    found, passes = [], 0
    for prompt in policy.encode_rows(rows):
        search = _DiverseBeams(policy, num_groups, num_samples // num_groups, penalty)
        groups = search.run(prompt)
        if any(len(group) < search.size for group in groups):
            _too_few(search.size)
        found += [z for group in groups for z in group]
        passes += search.token_passes
    return Decoded(policy.rollouts(rows, _split(found, num_samples)), passes)


def _too_few(beams: int) -> NoReturn:
    raise ConfigError(f"the support has too few completions for {beams} beams: lower num_samples")


def _split(items: list[list[int]], size: int) -> list[list[list[int]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class _DiverseBeams:
    """Diverse beam search for one prompt (Vijayakumar et al. 2016, algorithm 1).

    Group g ranks extensions by log q less `penalty` times the number of beams of groups before g that wrote the
    same token at this step. The penalty is not carried along: scores stay log q. Stopping costs no penalty.
    """

    def __init__(self, policy: Policy, groups: int, size: int, penalty: float):
        self.policy, self.groups, self.size, self.penalty = policy, groups, size, penalty
        self.token_passes = 0

    def run(self, prompt: list[int]) -> list[list[list[int]]]:
        """The completions of each group, best first."""
        device, support, passes = self.policy.device, self.policy.support, self.policy.passes
        index = torch.zeros(self.groups * self.size, dtype=torch.long, device=device)
        frontier = Frontier(passes, support, passes.encode([prompt]), index)
        text = frontier.text
        # A group starts from one beam; copies of it would fill the group with equal completions.
        scores = torch.full((self.groups, self.size), -torch.inf, device=device)
        scores[:, 0] = 0.0
        tokens = torch.zeros(len(index), 0, dtype=torch.long, device=device)
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(self.groups)]
        for _ in range(support.max_tokens + 1):
            self.token_passes += len(frontier.t)
            log_q = frontier.step().merged(support.stop_ids)[text]
            parents, ids, scores = self._extend(log_q, scores, tokens, finished)
            if all(self._done(f, best) for f, best in zip(finished, scores.amax(1).tolist(), strict=True)):
                break
            text = frontier.append(text[parents], ids)
            tokens = torch.cat([tokens[parents], ids[:, None]], dim=1)
        return [[z for _, z in group] for group in finished]

    def _done(self, finished: list[tuple[float, list[int]]], best: float) -> bool:
        """Scores only fall: no beam still alive can enter a full group."""
        return best == -torch.inf or (len(finished) == self.size and best <= finished[-1][0])

    def _extend(
        self, log_q: Tensor, scores: Tensor, tokens: Tensor, finished: list[list[tuple[float, list[int]]]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Parents [B], tokens [B] and scores [groups, size] of the beams that go on; the others join `finished`."""
        vocab, stop = log_q.shape[1], self.policy.support.stop_ids[0]
        used = torch.zeros(vocab, device=log_q.device)
        parents, ids, kept = [], [], []
        for g in range(self.groups):
            first = g * self.size
            total = (scores[g, :, None] + log_q[first : first + self.size]).flatten()
            rank = total - self.penalty * used.repeat(self.size)
            best = rank.topk(2 * self.size).indices  # at most `size` of these stop
            ends = best % vocab == stop
            for i in best[: self.size][ends[: self.size]].tolist():
                if total[i] > -torch.inf:
                    z = [*tokens[first + i // vocab].tolist(), stop]
                    finished[g].append((total[i].item(), z))
            finished[g] = sorted(finished[g], key=lambda pair: -pair[0])[: self.size]
            going = best[~ends][: self.size]
            parents.append(first + going // vocab)
            ids.append(going % vocab)
            kept.append(total[going])
            alive = going[total[going] > -torch.inf]
            used += torch.bincount(alive % vocab, minlength=vocab)
        return torch.cat(parents), torch.cat(ids), torch.stack(kept)
