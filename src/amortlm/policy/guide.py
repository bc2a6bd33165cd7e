"""Proposals with another law on the same support: the frozen model, guided to what the automaton of a support asks for
(`SupportLaw.guided`), and a policy at another temperature."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from amortlm.policy.policy import Policy
from amortlm.support import SupportLaw
from amortlm.types import Row

TEXTS, ROWS = 32, 4  # completions, and the rows that they are of
FLOOR = 0.01  # share of each chance that is uniform: no legal token may have chance 0


def guided(policy: Policy, rows: Sequence[Row], seed: object = 0) -> Policy:
    """The frozen model under the policy's prompt, guided on its support: a proposal where constraints are rare.

    `Posterior(guided(policy, rows), target).sample(row, n, correct="sir")` draws from the posterior without training.
    The policy itself may be trained or not; its weights are not used. A guided policy is not saved, and servers do not
    draw from it. rows: a few rows that it will be used on. Without an automaton (no pattern, no list) it is the frozen
    model itself.
    """
    frozen = policy.prior
    frozen.support = guided_law(policy, rows, seed)
    return frozen


def tempered(policy: Policy, temperature: float) -> Policy:
    """The policy with another law: each token is drawn from the softmax of logits / temperature on its legal tokens.

    Its log q is exact, so it is a proposal like any other: `tempered(policy.prior, 1 / a)` for the power posterior
    p(z|x)^a (docs/inference.md). Unlike with `Exploration`, log q is that of what is drawn. It shares its weights with
    the policy. A tempered policy is not saved, and servers do not draw from it. Raises ConfigError unless the
    temperature is a finite number above 0.
    """
    other = copy.copy(policy)
    other.support = policy.support.tempered(temperature)
    return other


def guided_law(policy: Policy, rows: Sequence[Row], seed: object = 0) -> SupportLaw:
    """The law of the policy's support, guided by the frozen model: made once for all rows, from the first of them.

    The chances of tokens are the model's own next-token probabilities, on average over the states of a few completions
    that it writes on the support. Without an automaton (no pattern, no list) the law stays as it is.
    """
    if policy.support.automaton is None:
        return policy.support
    chance = _frequencies(policy, rows[:ROWS], seed)
    log_chance = ((1 - FLOOR) * chance + FLOOR / len(chance)).log()
    return policy.support.guided(log_chance, log_chance[list(policy.support.stop_ids)].logsumexp(0).item())


@torch.no_grad()
def _frequencies(policy: Policy, rows: Sequence[Row], seed: object) -> Tensor:
    """[V] float64: chances of tokens, on the CPU."""
    passes = policy.lm.passes
    rollouts, _ = policy.prior.sample(rows, TEXTS // len(rows), seed=("guide", seed))
    total, count = torch.zeros(policy.lm.vocab_size, dtype=torch.float64), 0
    prompts = policy.encode_rows(rows)
    for block in passes.blocks(prompts):
        prefix = passes.encode(prompts[block])
        index = rollouts.row_index
        mine = ((index >= block.start) & (index < block.stop)).nonzero().squeeze(1)
        for group in passes.groups(prefix, rollouts.lengths[mine]):
            at = mine[group]
            lengths = rollouts.lengths[at].clamp(max=policy.support.max_tokens - 1)
            tokens = rollouts.tokens[at, : max(1, int(lengths.max()))]
            logits = passes.state_logits(prefix, index[at] - block.start, tokens)
            for text, length in zip(logits, lengths.tolist(), strict=True):
                total += text[: length + 1].float().softmax(-1).sum(0).double().cpu()
                count += length + 1
    return total / count
