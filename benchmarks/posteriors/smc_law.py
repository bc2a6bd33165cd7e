"""The law of one output of sequential Monte Carlo, simulated on the enumerated tree: no model, many runs at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .laws import Array, Law, Space, log_weights

SIMULATED = 2**18  # particles simulated at once


def smc_law(
    space: Space,
    q: Array,
    log_r: Array,
    n: int,
    rng: np.random.Generator,
    *,
    twisted: bool,
    runs: int,
    threshold: float = 0.5,
) -> Law:
    """`amortlm.inference.smc` simulated `runs` times with n particles: the mean of its self-normalised weights.

    Noise of the simulation adds to distances from it: see `between`. twisted: the target scores every prefix.
    """
    cdf = space.next_cdf(q)
    with np.errstate(divide="ignore"):
        log_w = space.nodes(log_weights(np.log(q), log_r), -np.inf)
    mass, fail, passes, done = np.zeros(len(log_w)), 0.0, 0.0, 0
    while done < runs:
        part = min(runs - done, max(1, SIMULATED // n))
        particles = _Particles(space, cdf, log_w, part, n, rng, twisted)
        for t in range(1, space.max_tokens):
            particles.advance()
            particles.maybe_resample(t, threshold)
        particles.advance()
        weight = particles.weights()
        np.add.at(mass, particles.node.ravel(), weight.ravel())
        fail += float((weight.sum(1) == 0).sum())
        passes += float(particles.passes.sum())
        done += part
    return Law(mass[space.first :] / runs, fail / runs, passes / runs)


class _Particles:
    """Runs x n particles: node, whether its stop is drawn, whether it stopped earlier, log correction."""

    def __init__(
        self,
        space: Space,
        cdf: Array,
        log_w: Array,
        runs: int,
        n: int,
        rng: np.random.Generator,
        twisted: bool,
    ):
        self.space, self.cdf, self.log_w, self.rng, self.twisted = space, cdf, log_w, rng, twisted
        self.node = np.zeros((runs, n), dtype=np.int64)
        self.stopped = np.zeros((runs, n), dtype=bool)
        self.log_c = np.zeros((runs, n))
        self.passes = np.full(runs, float(n))
        self.action = self.draw(self.node)

    def draw(self, node: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next token of each node, `width` for the stop (sure where the string is full)."""
        out = np.full(node.shape, self.space.width)
        inner = node < len(self.cdf)
        u = self.rng.random(int(inner.sum()))
        out[inner] = (self.cdf[node[inner]] <= u[:, None]).sum(1).clip(max=self.space.width)
        return out

    def advance(self) -> None:
        """Carry out the drawn actions, and draw the next."""
        self.stopped |= self.action == self.space.width
        go = ~self.stopped
        # Children of node 0 start at 1, those of node i at 1 + i * width.
        self.node[go] = 1 + self.node[go] * self.space.width + self.action[go]
        self.action[go] = self.draw(self.node[go])

    def maybe_resample(self, t: int, threshold: float) -> None:
        twist = self._twists()
        value = self.log_c + twist
        top = value.max(1, keepdims=True)
        scaled = np.exp(value - np.where(np.isfinite(top), top, 0.0))
        ess = scaled.sum(1) ** 2 / np.maximum((scaled**2).sum(1), 1e-300)
        n = value.shape[1]
        rows = ((ess < threshold * n * (1 - 1e-9)) & (~self.stopped).any(1)).nonzero()[0]
        if len(rows) == 0:
            return
        scaled, twist = scaled[rows], twist[rows]
        cdf = scaled.cumsum(1) / scaled.sum(1, keepdims=True)
        at = np.arange(len(rows))[:, None]
        positions = (np.arange(n) + self.rng.random((len(rows), 1))) / n
        flat = np.searchsorted((cdf + at).ravel(), (positions + at).ravel(), side="right")
        ancestors = (flat.reshape(len(rows), n) - at * n).clip(0, n - 1)
        mean = np.log(scaled.mean(1, keepdims=True)) + top[rows]
        self.log_c[rows] = mean - np.take_along_axis(twist, ancestors, 1)
        for name in ("node", "stopped", "action"):
            held = getattr(self, name)
            held[rows] = np.take_along_axis(held[rows], ancestors, 1)
        live = ~self.stopped[rows]
        action = self.action[rows]
        action[live] = self.draw(self.node[rows][live])
        self.action[rows] = action
        self.passes[rows] += live.sum(1)

    def _twists(self) -> Array:
        """As `amortlm.inference.smc.twists`."""
        twist = self.log_w[self.node]
        if not self.twisted:  # only finished completions are scored
            twist = np.where(self.stopped, twist, -np.inf)
        known = self.stopped | np.isfinite(twist)
        held = np.where(known, twist, -np.inf)
        top = held.max(1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        c = np.where(known, np.exp(self.log_c - self.log_c.max(1, keepdims=True)), 0.0)
        total, weight = (c * np.exp(held - top)).sum(1, keepdims=True), c.sum(1, keepdims=True)
        mean = np.where(total > 0, np.log(np.maximum(total, 1e-300) / np.maximum(weight, 1e-300)) + top, 0.0)
        half = np.logaddexp(twist, mean) - np.log(2)
        return np.where(self.stopped, twist, np.where(known, half, mean))

    def weights(self) -> Array:
        """Self-normalised in each run; all zero where nothing has R > 0."""
        log = self.log_c + self.log_w[self.node]
        top = log.max(1, keepdims=True)
        raw = np.exp(log - np.where(np.isfinite(top), top, 0.0))
        return raw / np.maximum(raw.sum(1, keepdims=True), 1e-300)


def average(first: Law, second: Law) -> Law:
    return Law(
        (first.mass + second.mass) / 2, (first.fail + second.fail) / 2, (first.passes + second.passes) / 2
    )


def between(first: Law, second: Law, p: Array) -> tuple[float, float]:
    """(low, high) for the total variation of a simulated law, from two independent halves of its runs.

    High: the plain distance of the mean, to which noise adds. Low: the mass that one half puts where the other half is
    above p, less p's mass there: a lower bound in expectation.
    """
    lows = []
    for a, b in ((first, second), (second, first)):
        over = a.mass > p
        lows.append(float((b.mass - p)[over].sum()) + b.fail)
    return max(0.0, sum(lows) / 2), average(first, second).total_variation(p)
