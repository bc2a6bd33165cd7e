"""Samplers draw completions from q: a protocol, which other processes or servers can implement, and the local engine.

`amortlm.policy.laws.check_sampler` tests an implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws, Exploration, Watch, decode, decode_pack, renumbered
from amortlm.engine.memory import Memory
from amortlm.engine.packs import Sharing
from amortlm.engine.passes import Passes
from amortlm.engine.prefix import pad_right
from amortlm.engine.shards import put
from amortlm.errors import ConfigError
from amortlm.support.law import SupportLaw


@dataclass(frozen=True)
class Request:
    """A request for B completions of N prompts. It holds no model and can be pickled.

    prompts      N token lists
    counts       completions of each prompt, B in all
    seeds        seed of each prompt's stream of random numbers
    law          the law of the support
    exploration  how sampling differs from q (default: not at all)
    kept         B token lists with which the completions begin (default: none); they add 0 to log q
    watch        called with each token while it draws; a sampler elsewhere may leave it out, and a request that has one
                 cannot be pickled
    """

    prompts: Sequence[Sequence[int]]
    counts: Sequence[int]
    seeds: Sequence[int]
    law: SupportLaw
    exploration: Exploration | None = None
    kept: Sequence[Sequence[int]] | None = None
    watch: Watch | None = None

    @property
    def index(self) -> Tensor:
        """[B] the prompt of each completion."""
        return torch.arange(len(self.prompts)).repeat_interleave(torch.tensor(self.counts))

    def each(self) -> list[Request]:
        """A request for each prompt that has completions, in order."""
        found, start = [], 0
        for i, count in enumerate(self.counts):
            own = slice(start, start + count)
            start += count
            if count:
                found.append(
                    replace(
                        self,
                        prompts=self.prompts[i : i + 1],
                        counts=[count],
                        seeds=self.seeds[i : i + 1],
                        exploration=None if self.exploration is None else self.exploration.select(own),
                        kept=None if self.kept is None else self.kept[own],
                    )
                )
        return found


class Sampler(Protocol):
    """Draws completions from q, and reports their log q and the version of its weights.

    reproducible: does a prompt get the same completions for the same seed, whatever else is in the request?
    """

    reproducible: bool

    def sample(self, request: Request) -> Draws:
        """B completions in the order of `request.index`, drawn with the exploration, and their log q (nats) without
        it."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Load the trainable weights of a policy, by name. Raises ConfigError if they do not fit."""
        ...


class LocalSampler:
    """The sampler in this process; it uses the same modules that are trained."""

    reproducible = True
    pack = staticmethod(decode_pack)

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
                renumbered(request.watch, mine),
                self.pack,
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
                f"the weights belong to another policy: {odd[0]} is missing, unknown or of another shape"
            )
        for name, p in own.items():
            put(p, weights[name])
        self.version = version


def _given(request: Request, device: torch.device) -> tuple[Draws | None, Tensor | None]:
    """(the kept tokens as draws with T = max_tokens, [B] their numbers), or (None, None)."""
    if request.kept is None:
        return None, None
    if request.law.tool is not None:
        raise ConfigError("a completion that a tool writes into cannot be continued: leave `kept` out")
    blank = Draws.blank(len(request.kept), request.law, device)
    tokens, keep = pad_right(request.kept, device)
    blank.tokens[:, : tokens.shape[1]] = tokens
    blank.log_pterm.fill_(-torch.inf)
    return blank, keep


def uniform_streams(seeds: Sequence[int], counts: Sequence[int], length: int) -> Tensor:
    """[sum of counts, length] uniform numbers in [0, 1), from one generator per seed."""
    out = []
    for seed, count in zip(seeds, counts, strict=True):
        out.append(torch.rand(count, length, generator=torch.Generator().manual_seed(seed)))
    return torch.cat(out)
