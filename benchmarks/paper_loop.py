"""The paper's procedure as a plain loop: the yardstick of `speed.py`.

As the released code of Hu et al. 2024 works: every copy of a prompt is encoded, the gradient runs through decoding with
a key/value cache, token by token, every step keeps its log-softmax, rows that have stopped stay in the batch, the
reward of every prefix is a full forward pass of the reference, and SubTB runs over all pairs. Of amortlm it uses only
the name of the argument that takes the cache.
Left out, in its favour: the replay buffer with its edit distances, and one prompt at a time (here all at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from amortlm.versions import cache_argument

CACHE = cache_argument(())  # of transformers' own models


@dataclass(frozen=True)
class Batch:
    """B trajectories as token lists, and the support, with one stop symbol.

    prompts, before [B]  what stands before z for the policy, and for the reference
    after [B]            the text behind the stop symbol, scored by the reference; empty for continuation
    group [B]            number of the prompt
    weight               of the log-probability in log R (1 / temperature)
    """

    prompts: Sequence[Sequence[int]]
    before: Sequence[Sequence[int]]
    after: Sequence[Sequence[int]]
    group: Sequence[int]
    completions: Sequence[Sequence[int]]
    allowed: Tensor
    stop: int
    min_tokens: int
    max_tokens: int
    weight: float = 1.0

    @property
    def longest(self) -> int:
        return max(map(len, self.completions))


def loss(policy: Any, reference: Any, batch: Batch, pass_per_prefix: bool = True) -> Tensor:
    """SubTB with lambda = 1 over all stopping states, the root tied to the group's mean final log weight.

    pass_per_prefix=False: for continuation, where one pass over z scores all its prefixes, as the released code does.
    """
    log_pf, log_pterm = decode(policy, batch)
    with torch.no_grad():
        score = reward_per_prefix if pass_per_prefix else reward_in_one_pass
        log_reward = batch.weight * score(reference, batch)
    log_w = log_reward - torch.nn.functional.pad(log_pf, (1, 0)).cumsum(1) - log_pterm
    states = torch.arange(log_w.shape[1], device=log_w.device)
    lengths = torch.tensor([len(z) for z in batch.completions], device=log_w.device)
    mask = (states >= batch.min_tokens) & (states <= lengths[:, None])
    log_w = torch.where(mask, log_w, 0.0)
    if batch.min_tokens > 0:
        final = log_w.detach().gather(1, lengths[:, None]).squeeze(1)
        group = torch.tensor(batch.group, device=log_w.device)
        root = torch.stack([final[group == g].mean() for g in batch.group])
        log_w, mask = torch.cat([root[:, None], log_w[:, 1:]], 1), mask | (states == 0)
    return subtb(log_w, mask)


def decode(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log_pf [B, T], log_pterm [B, T+1]) with gradient, token by token.

    A token is drawn at every step; the one that is written is the batch's, so that two methods see the same samples.
    """
    device = batch.allowed.device
    width = max(map(len, batch.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch.prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch.prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    written = torch.tensor([[*z, *[0] * (batch.longest - len(z))] for z in batch.completions], device=device)
    cache = DynamicCache(config=model.config)
    kept, log_pf, log_pterm = [], [], []
    for t in range(batch.longest + 1):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": position, CACHE: cache}
        out = model(**given, use_cache=True)
        legal = batch.allowed & (t < batch.max_tokens)
        legal[batch.stop] = t >= batch.min_tokens
        log_p = out.logits[:, -1].float().masked_fill(~legal, -torch.inf).log_softmax(-1)
        kept.append(log_p)
        log_pterm.append(log_p[:, batch.stop])
        with torch.no_grad():
            torch.multinomial(log_p.exp(), 1)
        if t < batch.longest:
            ids = written[:, t : t + 1]
            log_pf.append(log_p.gather(1, ids).squeeze(1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
    lengths = torch.tensor([len(z) for z in batch.completions], device=device)
    inside = torch.arange(batch.longest, device=device) < lengths[:, None]
    return torch.where(inside, torch.stack(log_pf, 1), 0.0), torch.stack(log_pterm, 1)


def reward_per_prefix(model: Any, batch: Batch) -> Tensor:
    """log p(z_1:t stop after | before) [B, T+1]: one full pass for each t, over the trajectories that reach it."""
    out = torch.zeros(len(batch.completions), batch.longest + 1, device=batch.allowed.device)
    for t in range(batch.min_tokens, batch.longest + 1):
        reach = [i for i, z in enumerate(batch.completions) if len(z) >= t]
        scored = [[*batch.completions[i][:t], batch.stop, *batch.after[i]] for i in reach]
        log_p, inside = _full_pass(model, [batch.before[i] for i in reach], scored, out.device)
        out[reach, t] = torch.where(inside, log_p, 0.0).sum(1)
    return out


def reward_in_one_pass(model: Any, batch: Batch) -> Tensor:
    """The same for continuation, whose prefixes one pass scores: log p(z_1:t) and the stop symbol after it."""
    assert not any(batch.after)
    device = batch.allowed.device
    scored = [[*z, batch.stop] for z in batch.completions]
    log_p, inside = _full_pass(model, batch.before, scored, device, batch.stop)
    tokens, stop = log_p.unbind(-1)
    return torch.nn.functional.pad(torch.where(inside, tokens, 0.0)[:, :-1], (1, 0)).cumsum(1) + stop


def _full_pass(
    model: Any,
    given: Sequence[Sequence[int]],
    scored: Sequence[Sequence[int]],
    device: torch.device,
    also: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p of the scored tokens [b, L] (with `also`: [b, L, 2], of that token too), and which are not padding."""
    rows = [[*g, *s] for g, s in zip(given, scored, strict=True)]
    width, length = max(map(len, rows)), max(map(len, scored))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)
    log_p = model(input_ids=ids).logits.float().log_softmax(-1)
    start = torch.tensor([len(g) for g in given], device=device)[:, None]
    place = (start + torch.arange(length, device=device)).clamp(max=width - 1)
    inside = (
        torch.arange(length, device=device) < torch.tensor([len(s) for s in scored], device=device)[:, None]
    )
    row = torch.arange(len(rows), device=device)[:, None]
    picked = log_p[row, place - 1, ids.gather(1, place)]
    if also is not None:
        picked = torch.stack([picked, log_p[row, place - 1, also]], -1)
    return picked, inside


def subtb(log_w: Tensor, mask: Tensor) -> Tensor:
    """Mean over pairs of stopping states of (log_w[j] - log_w[i])^2, then over trajectories, one distance at a time."""
    total, count = log_w.new_zeros(len(log_w)), log_w.new_zeros(len(log_w))
    for d in range(1, log_w.shape[1]):
        both = mask[:, d:] & mask[:, :-d]
        total = total + torch.where(both, (log_w[:, d:] - log_w[:, :-d]) ** 2, 0.0).sum(1)
        count = count + both.sum(1)
    return (total / count.clamp(min=1)).mean()
