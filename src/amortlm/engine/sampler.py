"""What draws completions: a protocol, so that they may be drawn elsewhere, and the engine in this process.

`amortlm.policy.laws.check_sampler` is the law of whatever implements it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws, Exploration, decode
from amortlm.engine.memory import Memory
from amortlm.engine.passes import Passes, Sharing, pad_right
from amortlm.errors import ConfigError
from amortlm.support.law import SupportLaw


@dataclass(frozen=True)
class Request:
    """Completions to draw for N prompts. Can be pickled: it holds no model.

    prompts  N token lists; counts: completions of each, B in all; seeds: of the stream of random numbers of each
    kept     B token lists that the completions begin with (default: nothing); not drawn, they count 0 in log q
    """

    prompts: Sequence[Sequence[int]]
    counts: Sequence[int]
    seeds: Sequence[int]
    law: SupportLaw
    exploration: Exploration | None = None
    kept: Sequence[Sequence[int]] | None = None

    @property
    def index(self) -> Tensor:
        """[B] the prompt of each completion."""
        return torch.arange(len(self.prompts)).repeat_interleave(torch.tensor(self.counts))


class Sampler(Protocol):
    """Draws completions from q, and says with what log q and by which weights it drew them.

    reproducible: does a prompt get the same completions for the same seed, whatever else is in the request?
    """

    reproducible: bool

    def sample(self, request: Request) -> Draws:
        """B completions in the order of `request.index`, drawn with its exploration, and their log q without it."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over the trainable weights of a policy, by name. Raises ConfigError if they do not fit."""
        ...


class LocalSampler:
    """The engine of this process, on the very modules that are trained."""

    reproducible = True

    def __init__(self, model: Any, sharing: Sharing, memory: Memory | None = None):
        self.model, self.sharing, self.memory, self.version = model, sharing, memory, 0

    @torch.no_grad()
    def sample(self, request: Request) -> Draws:
        passes, device = Passes(self.model, self.sharing, self.memory), self.model.device
        # All drawn before the work is cut, so that no stream depends on how.
        streams = uniform_streams(request.seeds, request.counts, request.law.max_tokens + 1).to(device)
        kept, keep = _given(request, device)
        index = request.index.to(device)
        parts = []
        for block in passes.blocks(request.prompts):
            mine = ((index >= block.start) & (index < block.stop)).nonzero().squeeze(1)
            if len(mine) == 0:
                continue
            drawn = decode(
                passes,
                request.law,
                passes.encode(request.prompts[block]),
                index[mine] - block.start,
                streams[mine],
                None if request.exploration is None else request.exploration.select(mine),
                None if kept is None else kept.select(mine),
                None if keep is None else keep[mine],
            )
            parts.append(drawn)
        return replace(Draws.cat(parts), version=self.version).trimmed()

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        odd = sorted(own.keys() ^ weights.keys()) + [
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ]
        if odd:
            raise ConfigError(
                f"the weights are of another policy: {odd[0]} is missing, unknown or of another shape"
            )
        for name, p in own.items():
            p.copy_(weights[name])
        self.version = version


def _given(request: Request, device: torch.device) -> tuple[Draws | None, Tensor | None]:
    """What the completions begin with, at the full width, and how many tokens of each that is."""
    if request.kept is None:
        return None, None
    if request.law.tool is not None:
        raise ConfigError("a completion that a tool writes into cannot be gone on with: leave `kept` out")
    blank = Draws.blank(len(request.kept), request.law, device)
    tokens, keep = pad_right(request.kept, device)
    blank.tokens[:, : tokens.shape[1]] = tokens
    blank.log_pterm.fill_(-torch.inf)
    return blank, keep


def uniform_streams(seeds: Sequence[int], counts: Sequence[int], length: int) -> Tensor:
    """[sum of counts, length] uniforms in [0, 1): a generator for each seed."""
    out = []
    for seed, count in zip(seeds, counts, strict=True):
        out.append(torch.rand(count, length, generator=torch.Generator().manual_seed(seed)))
    return torch.cat(out)
