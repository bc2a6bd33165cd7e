"""Policies and targets whose laws are tables, so that thousands of diagnoses of the library's own code take minutes."""

from __future__ import annotations

from collections.abc import Sequence
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
from amortlm.support import SupportLaw
from amortlm.targets.base import Scoring, Target
from amortlm.text.template import PromptTemplate
from amortlm.types import Row

from .posteriors.laws import Array, Space

LEAST = -200.0  # nats: no softmax gives a probability of 0
WHOLE = Sharing(steps=False, spans=False, packed=False)


class TableModel(nn.Module):
    """The causal model whose completions of a space have the law q [M]. Tokens: the words, the stop symbol, a prompt.

    In the order of a space, node i has the children width i + 1 .. width i + width.
    """

    dtype = torch.float32
    device = torch.device("cpu")

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
        self.config = PretrainedConfig()
        self._head = nn.Embedding(space.width + 2, 1)

    def get_output_embeddings(self) -> nn.Embedding:
        return self._head

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        node = torch.zeros(len(input_ids), dtype=torch.long)
        out = [self.table[node]]
        for token in input_ids[:, 1:].T:
            node = (self.width * node + 1 + token).clamp(max=len(self.table) - 1)  # beyond it: padding
            out.append(self.table[node])
        return SimpleNamespace(logits=torch.stack(out, 1)[:, -logits_to_keep:])


class TablePolicy(Policy):
    """The policy with law q [M], of a frozen model with law prior [M]."""

    def __init__(self, space: Space, q: Array, prior: Array):
        nn.Module.__init__(self)
        frozen, self.model = TableModel(space, prior), TableModel(space, q)
        self.lm = SimpleNamespace(model=frozen, memory=Memory(1024.0), name="table")  # type: ignore[assignment]
        self.prompt, self.sharing, self.is_full = PromptTemplate(""), WHOLE, False
        allowed = torch.arange(space.width + 2) < space.width
        self.support = SupportLaw((space.width,), space.min_tokens, space.max_tokens, allowed)
        self.sampler = LocalSampler(self.model, self.sharing, self.lm.memory)

    def encode_rows(self, rows: Sequence[Row]) -> list[list[int]]:
        return [[self.model.width + 1] for _ in rows]


class TableTarget(Target):
    """log R [M] of every completion of a space."""

    def __init__(self, space: Space, log_r: Array, every_prefix: bool = True):
        self.width, self.every_prefix = space.width, every_prefix
        self.log_r = torch.from_numpy(space.nodes(log_r, -np.inf)).float()

    def score_batch(self, scoring: Scoring) -> Tensor:
        node = torch.zeros(len(scoring.rollouts), dtype=torch.long)
        out = [self.log_r[node]]
        for token in scoring.rollouts.tokens.T:
            node = (self.width * node + 1 + token).clamp(max=len(self.log_r) - 1)
            out.append(self.log_r[node])
        return torch.stack(out, 1)
