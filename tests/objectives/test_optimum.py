"""Law 3 on a small world: q built from the backward flows of a tree is R / Z, and nothing is left to learn."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from amortlm.objectives import (
    alpha_divergence,
    db,
    forward_kl,
    log_weights,
    prefix_tb,
    subtb,
    tb,
    vargrad,
    with_root,
)
from amortlm.types import PolicyLogProbs

TOKENS, DEPTH = 3, 3
Z = tuple[int, ...]


def tree(min_tokens: int) -> tuple[list[Z], dict[Z, float], dict[Z, float]]:
    """(completions, log R, log flow) over all sequences of 3 tokens of length min_tokens to 3."""
    generator = torch.Generator().manual_seed(4)
    nodes = [z for n in range(DEPTH + 1) for z in product(range(TOKENS), repeat=n)]
    log_r = {z: 2 * torch.randn((), generator=generator).item() for z in nodes if len(z) >= min_tokens}
    flow: dict[Z, float] = {}
    for z in reversed(nodes):
        below = [flow[(*z, a)] for a in range(TOKENS) if (*z, a) in flow]
        here = math.exp(log_r[z]) if z in log_r else 0.0
        flow[z] = here + sum(below)
    return list(log_r), log_r, {z: math.log(f) for z, f in flow.items()}


def batch(min_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """(log_reward, log_pf, log_pterm, stop_mask, log Z) of every completion, under q = R / Z."""
    completions, log_r, log_flow = tree(min_tokens)
    n = len(completions)
    log_reward = torch.zeros(n, DEPTH + 1, dtype=torch.float64)
    log_pf = torch.zeros(n, DEPTH, dtype=torch.float64)
    log_pterm = torch.full((n, DEPTH + 1), -torch.inf, dtype=torch.float64)
    mask = torch.zeros(n, DEPTH + 1, dtype=torch.bool)
    for b, z in enumerate(completions):
        for t in range(len(z) + 1):
            prefix = z[:t]
            if t > 0:
                log_pf[b, t - 1] = log_flow[prefix] - log_flow[z[: t - 1]]
            if prefix in log_r:
                mask[b, t], log_reward[b, t] = True, log_r[prefix]
                log_pterm[b, t] = log_r[prefix] - log_flow[prefix]
    return log_reward, log_pf, log_pterm, mask, log_flow[()]


def losses(log_w: Tensor, mask: Tensor, log_z: float) -> dict[str, Tensor]:
    group = torch.zeros(len(log_w), dtype=torch.long)
    known = torch.tensor([log_z], dtype=torch.float64)
    return {
        "subtb from the root": subtb(*with_root(log_w, mask, group, known))[0],
        "subtb from the estimated root": subtb(*with_root(log_w, mask, group))[0],
        "db from the root": db(*with_root(log_w, mask, group))[0],
        "subtb": subtb(log_w, mask)[0],
        "subtb 0.7": subtb(log_w, mask, 0.7)[0],
        "db": db(log_w, mask)[0],
        "tb": tb(log_w, mask, group, known)[0],
        "tb estimated": tb(log_w, mask, group)[0],
        "prefix_tb": prefix_tb(log_w, mask, group, known)[0],
        "prefix_tb estimated": prefix_tb(log_w, mask, group)[0],
        "vargrad": vargrad(log_w, mask, group)[0],
        "vargrad huber": vargrad(log_w, mask, group, 0.1)[0],
        "alpha": alpha_divergence(log_w, mask, group, 0.5)[0],
        "forward_kl": forward_kl(log_w, mask, group)[0],
    }


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_at_the_posterior_every_objective_is_zero(min_tokens: int) -> None:
    log_reward, log_pf, log_pterm, mask, log_z = batch(min_tokens)
    n = torch.arange(len(mask))
    lengths = (mask * torch.arange(DEPTH + 1)).amax(1)
    log_q = PolicyLogProbs(log_pf, log_pterm).final(lengths)
    torch.testing.assert_close(log_q.exp().sum().item(), 1.0)
    torch.testing.assert_close(log_q, log_reward[n, lengths] - log_z)

    leaves = log_pf.requires_grad_(), log_pterm.requires_grad_()
    log_w = log_weights(log_reward, PolicyLogProbs(*leaves), mask)
    torch.testing.assert_close(log_w[mask], torch.full_like(log_w[mask], log_z))
    for name, loss in losses(log_w, mask, log_z).items():
        assert loss.item() < 1e-9, name
        for gradient in torch.autograd.grad(loss, leaves, retain_graph=True):
            assert gradient[torch.isfinite(gradient)].abs().max() < 1e-6, name
            assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("what", ["a token", "a stop", "a reward"])
def test_away_from_the_posterior_every_objective_is_positive(what: str) -> None:
    log_reward, log_pf, log_pterm, mask, log_z = batch(1)
    changed = {"a token": log_pf, "a stop": log_pterm, "a reward": log_reward}[what]
    changed[20, 1] += 0.3  # a completion of three tokens
    changed[20, -1] += 0.2
    log_w = log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask)
    for name, loss in losses(log_w, mask, log_z).items():
        assert loss.item() > 1e-4, name


def test_only_the_root_sees_a_wrong_first_token() -> None:
    """With min_tokens = 1, states that can stop share their first token: its probability is the root's to say."""
    log_reward, log_pf, log_pterm, mask, log_z = batch(1)
    first = log_pf[:, 0].unique()
    wrong = dict(zip(first.tolist(), first.flip(0).tolist(), strict=True))  # still sums to one
    log_pf[:, 0] = torch.tensor([wrong[p] for p in log_pf[:, 0].tolist()])
    lengths = (mask * torch.arange(DEPTH + 1)).amax(1)
    assert PolicyLogProbs(log_pf, log_pterm).final(lengths).exp().sum().item() == pytest.approx(1, abs=1e-6)
    found = losses(log_weights(log_reward, PolicyLogProbs(log_pf, log_pterm), mask), mask, log_z)
    blind = {name for name, loss in found.items() if loss.item() < 1e-4}
    assert blind == {"subtb", "subtb 0.7", "db"}
