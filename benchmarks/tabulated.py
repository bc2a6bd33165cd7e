"""Policies and targets whose laws are tables, so that thousands of diagnoses of the library's own code take minutes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from amortlm import Policy
from amortlm.engine.memory import Memory
from amortlm.engine.packs import Sharing
from amortlm.engine.sampler import LocalSampler
from amortlm.seeds import seed_of
from amortlm.support import SupportLaw
from amortlm.targets.base import Scoring, Target
from amortlm.text.template import PromptTemplate
from amortlm.types import PolicyLogProbs, Rollouts, Row

from .posteriors.laws import Array, Space

LEAST = -200.0  # nats: no softmax gives a probability of 0
WHOLE = Sharing(steps=False, spans=False, packed=False)


def nodes(width: int, tokens: Tensor) -> Tensor:
    """[B, T+1] the nodes that the prefixes of tokens [B, T] lead to; after the end of a completion, others."""
    found = [torch.zeros(len(tokens), dtype=torch.long)]
    for token in tokens.T:
        found.append(width * found[-1] + 1 + token)
    return torch.stack(found, 1)


class TableModel(nn.Module):
    """The causal model whose completions of a space have the law q [M]. Tokens: the words, the stop symbol, a prompt.

    In the order of a space, node i has the children width i + 1 .. width i + width.
    """

    dtype = torch.float32
    device = torch.device("cpu")
    table: Tensor

    def __init__(self, space: Space, q: Array):
        super().__init__()
        self.width, inner = space.width, space.offset[space.max_tokens]
        own = space.nodes(q, 0.0)
        below = own.copy()
        for depth in range(space.max_tokens - 1, -1, -1):
            here, children = (slice(space.offset[d], space.offset[d + 1]) for d in (depth, depth + 1))
            below[here] += below[children].reshape(-1, space.width).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            table = np.stack([*below[1:].reshape(-1, space.width).T, own[:inner]]) / below[:inner]
            logits = np.log(np.nan_to_num(table)).clip(min=LEAST).T
        self.register_buffer("table", torch.from_numpy(np.pad(logits, ((0, 0), (0, 1)))).float())
        self.register_buffer("steps", self.table[:, :-1].log_softmax(1))
        self.register_buffer("cdf", torch.from_numpy(own.cumsum()))
        self.strings = space.strings
        self.config = PretrainedConfig()
        self._head = nn.Embedding(space.width + 2, 1)

    def get_output_embeddings(self) -> nn.Embedding:
        return self._head

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        node = nodes(self.width, input_ids[:, 1:]).clamp(max=len(self.table) - 1)
        return SimpleNamespace(logits=self.table[node][:, -logits_to_keep:])


class TablePolicy(Policy):
    """The policy with law q [M], of a frozen model with law prior [M].

    Whole completions are looked up; chains and particles go through the passes of any model.
    """

    def __init__(self, space: Space, q: Array, prior: Array):
        nn.Module.__init__(self)
        frozen, self.model = TableModel(space, prior), TableModel(space, q)
        local = partial(LocalSampler, sharing=WHOLE, memory=Memory(1024.0))
        self.lm = SimpleNamespace(  # type: ignore[assignment]
            model=frozen, memory=Memory(1024.0), name="table", local_sampler=local
        )
        self.prompt, self.sharing, self.is_full = PromptTemplate(""), WHOLE, False
        allowed = torch.arange(space.width + 2) < space.width
        self.support = SupportLaw((space.width,), space.min_tokens, space.max_tokens, allowed)
        self.sampler = local(self.model)

    def encode_rows(self, rows: Sequence[Row]) -> list[list[int]]:
        return [[self.model.width + 1] for _ in rows]

    def sample(self, rows: Sequence[Row], num_samples: int | Sequence[int] = 1, **given: Any) -> Any:
        """Of one row; `seed` of Policy.sample, and none of its other options."""
        assert isinstance(num_samples, int)
        generator = torch.Generator().manual_seed(
            seed_of(("table", given["seed"], self.model is self.lm.model))
        )
        u = torch.rand(num_samples, dtype=torch.float64, generator=generator)
        node = torch.searchsorted(self.model.cdf, u * self.model.cdf[-1], right=True)
        tokens = torch.from_numpy(self.model.strings[node.numpy()])
        lengths = (tokens >= 0).sum(1)
        rollouts = self.support.rollouts(rows, torch.zeros_like(lengths), tokens.clamp(min=0), lengths)
        return rollouts, self.evaluate(rollouts)

    def evaluate(self, rollouts: Rollouts) -> PolicyLogProbs:
        node = nodes(self.model.width, rollouts.tokens)
        steps = self.model.steps[node.clamp(max=len(self.model.steps) - 1)]
        log_pf = steps[:, :-1].gather(2, rollouts.tokens[:, :, None]).squeeze(2)
        log_pterm = torch.where(node < len(self.model.steps), steps[:, :, self.model.width], 0.0)
        return PolicyLogProbs(log_pf.masked_fill(~rollouts.action_mask, 0.0), log_pterm)


class TableTarget(Target):
    """log R [M] of every completion of a space."""

    def __init__(self, space: Space, log_r: Array, every_prefix: bool = True):
        self.space, self.every_prefix = space, every_prefix
        self.log_r = torch.from_numpy(space.nodes(log_r, -np.inf)).float()

    def score_batch(self, scoring: Scoring) -> Tensor:
        node = nodes(self.space.width, scoring.rollouts.tokens)
        return self.log_r[node.clamp(max=len(self.log_r) - 1)]
