"""The exact law of one output of block-wise Metropolis-Hastings on an enumerated support: no model, no simulation."""

from __future__ import annotations

import numpy as np
from benchmarks.posteriors.laws import Array, Law, Space, log_weights, metropolis_hastings


def blockwise(space: Space, log_q: Array, log_r: Array, block: int, steps: int) -> Law:
    """`amortlm.inference.blocks` with `steps` steps after every `block` tokens.

    Its texts of at most n tokens are the nodes of a smaller tree, whose leaves are unfinished. A pass is max_tokens of
    judged text: a step among texts of n tokens is n / max_tokens of one, and lengthening them is one in all.
    """
    q, log_w = space.nodes(np.exp(log_q), 0.0), space.nodes(log_weights(log_q, log_r), np.nan)
    below = subtree_mass(space, q)
    law, before, passes = np.ones(1), 0, 1.0
    for n in [*range(block, space.max_tokens, block), space.max_tokens]:
        last = n == space.max_tokens
        tree = Space(space.width, min(space.min_tokens, n), n)
        stop, leaf = space.offset[n], slice(space.offset[n], space.offset[n + 1])
        law = _lengthened(space, q, below, law, before, n)
        weight = log_w[leaf] if last else space.level(log_w, n - 1).repeat(space.width)
        here = slice(tree.first, None)
        q_n = np.concatenate([q[:stop], below[leaf]])[here]
        # Unknown only before min_tokens, where all texts are as long and unfinished: then all weights are equal.
        log_v = np.nan_to_num(np.concatenate([log_w[:stop], weight])[here])
        choices = np.minimum(tree.lengths[here] + 1.0, n)
        v = np.exp(log_v - log_v.max())
        (found,) = metropolis_hastings(tree, q_n, v, [steps + 1], start=law[here], choices=choices)
        law, before, passes = tree.nodes(found.mass, 0.0), n, passes + steps * n / space.max_tokens
    return Law(law[space.first :], 0.0, passes)


def subtree_mass(space: Space, q: Array) -> Array:
    """[nodes] the probability of all completions that begin with each text. q [nodes]."""
    mass = q.copy()
    for n in range(space.max_tokens - 1, -1, -1):
        mass[space.offset[n] : space.offset[n + 1]] += (
            space.level(mass, n + 1).reshape(-1, space.width).sum(1)
        )
    return mass


def _lengthened(space: Space, q: Array, below: Array, law: Array, before: int, n: int) -> Array:
    """[nodes of at most n tokens] the law after the unfinished texts of `before` tokens are written on to n."""
    out = np.zeros(space.offset[n + 1])
    out[: space.offset[before]] = law[: space.offset[before]]
    share = law[space.offset[before] :] / np.maximum(space.level(below, before), 1e-300)
    for length in range(before, n + 1):
        mass = space.level(below if length == n else q, length)
        out[space.offset[length] : space.offset[length + 1]] = mass * share.repeat(
            space.width ** (length - before)
        )
    return out
