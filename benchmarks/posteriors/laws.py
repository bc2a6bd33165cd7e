"""Exact laws on an enumerated support: what one output of a sampler is distributed as, at n passes.

A pass is one completion drawn and judged. With q and R known for every completion, nothing here touches a model:
rejection, best-of-n and Metropolis-Hastings have their law in closed form or by a recursion, SIR as an expectation over
one number (the sum of the other weights), and only SMC is simulated. A sampler that may end with nothing
(every weight zero) has the rest of its mass in `fail`, which counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = 512  # weights at which the law of SIR is computed
MODES = 20  # "modes": the likeliest completions of the posterior
DRAWS = 200  # ... that so many draws contain


@dataclass(frozen=True)
class Law:
    """mass [M] of one output on the M completions; fail: probability of no output; passes: judged completions.

    mass sums to 1 - fail.
    """

    mass: Array
    fail: float = 0.0
    passes: float = 1.0

    def total_variation(self, p: Array) -> float:
        return 0.5 * (float(np.abs(self.mass - p).sum()) + self.fail)

    def kl(self, p: Array) -> tuple[float, float]:
        """(KL(law || p), KL(p || law)) of the law given an output, nats; inf where one has mass and the other none."""
        given = self.mass / max(1.0 - self.fail, 1e-300)
        return _kl(given, p), _kl(p, given)

    def modes(self, p: Array) -> float:
        """Expected share of the MODES likeliest completions of p among DRAWS independent outputs."""
        top = np.argsort(p)[::-1][:MODES]
        return float((1 - (1 - self.mass[top].clip(0, 1)) ** DRAWS).mean())


def _kl(a: Array, b: Array) -> float:
    has = a > 0
    with np.errstate(divide="ignore"):
        return float((a[has] * (np.log(a[has]) - np.log(b[has]))).sum())


def floor(p: Array, n: int) -> float:
    """Expected total variation between p and the frequencies of n exact draws (normal approximation)."""
    return float(np.minimum(np.sqrt(p * (1 - p) / (2 * math.pi * n)), p).sum())


@dataclass(frozen=True)
class Space:
    """Strings of up to max_tokens of `width` tokens, as a tree: numbered by length, then in lexicographic order.

    Completions are the nodes from `first` on, in the order of `enumerate_posterior`.
    """

    width: int
    min_tokens: int
    max_tokens: int

    @cached_property
    def offset(self) -> list[int]:
        """offset[L]: the number of strings shorter than L."""
        return [sum(self.width**k for k in range(n)) for n in range(self.max_tokens + 2)]

    @property
    def first(self) -> int:
        return self.offset[self.min_tokens]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[nodes]"""
        counts = [self.width**n for n in range(self.max_tokens + 1)]
        return np.repeat(np.arange(self.max_tokens + 1), counts)

    @cached_property
    def strings(self) -> NDArray[np.int64]:
        """[nodes, max_tokens] the numbers of their tokens, -1 beyond their length."""
        out = [np.full((1, 0), -1)]
        for _ in range(self.max_tokens):
            choices = np.tile(np.arange(self.width), len(out[-1]))[:, None]
            out.append(np.concatenate([out[-1].repeat(self.width, 0), choices], 1))
        return np.concatenate(
            [np.pad(s, ((0, 0), (0, self.max_tokens - s.shape[1])), constant_values=-1) for s in out]
        )

    def nodes(self, values: Array, missing: float) -> Array:
        """Values of the completions [M] -> of all nodes."""
        return np.concatenate([np.full(self.first, missing), values])

    def level(self, values: Array, length: int) -> Array:
        return values[self.offset[length] : self.offset[length + 1]]

    def subtrees(self, depth: int) -> NDArray[np.int64]:
        """[width^depth, G] the completions (not nodes) that begin with each string of `depth` tokens."""
        parts = []
        for length in range(max(depth, self.min_tokens), self.max_tokens + 1):
            level = np.arange(self.offset[length], self.offset[length + 1]) - self.first
            parts.append(level.reshape(self.width**depth, -1))
        return np.concatenate(parts, axis=1)

    def next_cdf(self, q: Array) -> Array:
        """[nodes shorter than max_tokens, width + 1] cumulative probabilities of the next token; last: stop."""
        mass = self.nodes(q, 0.0)
        for length in range(self.max_tokens - 1, -1, -1):
            children = self.level(mass, length + 1).reshape(-1, self.width).sum(1)
            mass[self.offset[length] : self.offset[length + 1]] += children
        rows = [self.level(mass, n + 1).reshape(-1, self.width) for n in range(self.max_tokens)]
        inner = self.offset[self.max_tokens]
        table = np.concatenate([np.concatenate(rows), self.nodes(q, 0.0)[:inner, None]], axis=1)
        return table.cumsum(1) / np.maximum(table.sum(1, keepdims=True), 1e-300)


def log_weights(log_q: Array, log_r: Array) -> Array:
    """log w = log R - log q; -inf for what is never drawn."""
    return log_r - np.where(np.isneginf(log_q), np.inf, log_q)


def weights(log_q: Array, log_r: Array) -> Array:
    """w = R / q, the largest scaled to 1."""
    log_w = log_weights(log_q, log_r)
    return np.exp(log_w - log_w.max())


def rejection(q: Array, p: Array, n: int) -> Law:
    """At most n draws of q, each kept with probability w / max w: exact where it ends (the bound is an oracle's)."""
    acceptance = 1.0 / float((p[q > 0] / q[q > 0]).max())
    fail = (1 - acceptance) ** n
    return Law((1 - fail) * p, fail, (1 - fail) / acceptance)


def best_of(q: Array, log_r: Array, n: int) -> Law:
    """The draw of largest R among n; ties are shared as under q."""
    order = np.argsort(log_r)
    values, group = np.unique(log_r[order], return_inverse=True)
    of_value = np.bincount(group, q[order], minlength=len(values))
    below = np.concatenate([[0.0], of_value.cumsum().clip(max=1.0)])
    share = np.diff(below**n) / np.where(of_value > 0, of_value, 1.0)
    mass = np.empty_like(q)
    mass[order] = q[order] * share[group]
    return Law(mass / mass.sum(), 0.0, n)


def sir(q: Array, w: Array, n: int, rng: np.random.Generator) -> Law:
    """One of n draws of q, by weight: mass(z) = q(z) E[n w(z) / (w(z) + sum of n - 1 other weights)].

    The expectation is a smooth function of log w: a mean over simulated sums on a grid, interpolated, and scaled to the
    probability that some weight is positive, which is known.
    """
    possible = w > 0
    log_zero = math.log1p(-min(float(q[possible].sum()), 1.0 - 1e-16))
    fail = math.exp(n * log_zero) if not possible.all() else 0.0
    others = _sums(q, w, n - 1, rng)
    log_w = np.log(w[possible])
    grid = np.linspace(log_w.min(), log_w.max(), GRID)
    log_share = np.log([(1 / (1 + others * math.exp(-x))).mean() for x in grid])
    mass = np.zeros_like(q)
    mass[possible] = q[possible] * np.exp(np.interp(log_w, grid, log_share))
    return Law(mass * ((1 - fail) / mass.sum()), fail, n)


def _sums(q: Array, w: Array, n: int, rng: np.random.Generator) -> Array:
    """Sums of the weights of n draws of q: many of them for small n, fewer where they vary less."""
    if n == 0:
        return np.zeros(1)
    q = q / q.sum()
    replicates = min(max(2**20 // n, 256), 4096)
    if n <= 4096:
        index = np.searchsorted(q.cumsum(), rng.random((replicates, n))).clip(max=len(q) - 1)
        return w[index].sum(1)
    return np.array([rng.multinomial(n, q) @ w for _ in range(replicates)])


def metropolis_hastings(
    space: Space,
    q: Array,
    w: Array,
    passes: Iterable[int],
    start: Array | None = None,
    choices: Array | None = None,
) -> Iterator[Law]:
    """The law of a chain's state after `passes` judged completions (the first is its start, a draw of q).

    One step of `amortlm.inference.mcmc` as a linear map: from each prefix, mass m(z) moves to z' at rate
    q(z' | prefix) min(1, v(z') / v(z)), v = w / (L + 1). With the completions of a prefix sorted by v this is a
    cumulative sum from either side. start [M]: the law of the start (default: q). choices [M]: in place of L + 1, the
    number of prefixes, shortest first, among which a completion is cut.
    """
    among: Array = np.asarray(space.lengths[space.first :] + 1.0 if choices is None else choices, np.float64)
    v = np.where(w > 0, np.maximum(w, 1e-280) / among, 1e-290)  # R = 0: always left, and left for each other
    # A prefix of max_tokens leaves nothing to redraw: the chain stays.
    groups = [_Moves.of(space.subtrees(t), q, v) for t in range(space.max_tokens)]
    leaving = np.zeros_like(q)
    for moves in groups:
        moves.add_leaving(leaving)
    leaving /= among
    law, done = q / q.sum() if start is None else start, 1
    for n in passes:
        for _ in range(n - done):
            arriving = np.zeros_like(q)
            for moves in groups:
                moves.add_arriving(law / among, arriving)
            law = law * (1 - leaving) + arriving
            law /= law.sum()
        done = n
        yield Law(law, 0.0, n)


@dataclass(frozen=True)
class _Moves:
    """The completions of each prefix sorted by v: index, v, q given the prefix [groups, G]."""

    index: NDArray[np.int64]
    v: Array
    q: Array

    @classmethod
    def of(cls, members: NDArray[np.int64], q: Array, v: Array) -> _Moves:
        index = np.take_along_axis(members, v[members].argsort(1), 1)
        given = q[index]
        return cls(index, v[index], given / np.maximum(given.sum(1, keepdims=True), 1e-300))

    def add_arriving(self, m: Array, out: Array) -> None:
        here = m[self.index]
        over = here / self.v
        out[self.index] += self.q * (here.cumsum(1) + self.v * (_from_right(over) - over))

    def add_leaving(self, out: Array) -> None:
        below = (self.q * self.v).cumsum(1) / self.v
        out[self.index] += below + _from_right(self.q) - self.q


def _from_right(x: Array) -> Array:
    return x[:, ::-1].cumsum(1)[:, ::-1]
