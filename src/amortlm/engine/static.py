"""Decoding in a cache of a fixed size, for GPUs: the steps of `decoding.py` without the host between them.

The ordinary loop drops what has ended, merges equal texts and lets the cache grow, so that the host has to know after
each token what was drawn. Here each completion has a row, all shapes are fixed, and a step (the model's pass over one
token of each row, the law of the support, the draw) changes tensors in place and reads none of them on the host. On
CUDA the first step runs as it is, the second is captured as a graph, and the graph is replayed; elsewhere all run as
they are. The law and the draw are those of the ordinary loop, so a seed gives the same completions, up to rounding.

Opt-in (`static_cache` of a language model): it was not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from amortlm.engine.decoding import Draws, Exploration, Watch, begin, decode_pack, drawn
from amortlm.engine.exactness import Check, rotary_limit, rotary_switch
from amortlm.engine.packs import Sharing
from amortlm.engine.passes import Passes, pausing
from amortlm.engine.prefix import Prefix
from amortlm.engine.sampler import LocalSampler
from amortlm.engine.shards import shards_of
from amortlm.errors import ConfigError, ModelError
from amortlm.support.law import SupportLaw

PATIENCE = 16  # steps after which the host asks whether all completions have ended


class StaticSampler(LocalSampler):
    """The sampler in this process, with a static cache."""

    @staticmethod
    def pack(*given: Any) -> Draws:
        return static_pack(*given)


def require(model: Any, name: str, sharing: Sharing, self_check: bool) -> None:
    """Raise ModelError for a model that cannot decode in a static cache, by its architecture, or, with `self_check`,
    because its log-probabilities are not those of plain passes."""
    why = _unsupported(model, sharing)
    if why is None and self_check:
        check = Check(model, name)
        check.whole = [check.alone(text) for text in check.texts]
        if not check.compare("a static cache, token by token", lambda: _checked(check)):
            why = (
                f"its log-probabilities differ from those of plain passes {check.findings[-1].note}".rstrip()
            )
    if why is not None:
        raise ModelError(f"{name}: static_cache cannot be used: {why}; leave static_cache out")


def _unsupported(model: Any, sharing: Sharing) -> str | None:
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers has no static cache for {model.config.model_type}"
    if any(type(layer) is not StaticLayer for layer in StaticCache(model.config, max_cache_len=2).layers):
        return "its layers have windows or recurrent states, which that of transformers overwrites"
    if rotary_limit(model.config) is not None or rotary_switch(model.config) is not None:
        return "its rotary embeddings depend on the longest text, which the host would have to know"
    return None if sharing.steps else "it cannot continue a cached prompt token by token"


def _checked(check: Check) -> list[tuple[Tensor, Tensor]]:
    passes, steps = Passes(check.model, Sharing()), check.tokens.shape[1]
    writer = StaticWriter(passes, passes.encode(check.prompts), check.index, steps + 1)
    out = [writer.logits()]
    for token in check.tokens.unbind(1):
        writer.append(token, torch.ones_like(token, dtype=torch.bool))
        out.append(writer.logits())
    return check.pairs(torch.stack(out, 1))


class StaticWriter:
    """n texts that grow by a token each at every step, at most `steps` times, in one cache."""

    def __init__(self, passes: Passes, prefix: Prefix, index: Tensor, steps: int):
        past, device = prefix.mask[index], index.device
        self.passes, self._ids = passes, prefix.last[index]
        self._mask = torch.cat([past, past.new_zeros(len(index), steps)], dim=1)
        self._positions, self._slot = past.sum(1), torch.tensor(past.shape[1], device=device)
        self._columns = torch.arange(self._mask.shape[1], device=device)
        self._cache = StaticCache(passes.model.config, max_cache_len=self._mask.shape[1])
        layers: Sequence[Any] = [] if prefix.cache is None else prefix.cache.layers
        for number, layer in enumerate(layers):
            self._cache.update(layer.keys[index], layer.values[index], number)

    def logits(self) -> Tensor:
        """[n, V] logits of the next token. Call it once after each `append`."""
        self._mask.logical_or_(self._columns == self._slot)
        return self.passes.static_logits(self._ids, self._mask, self._positions, self._cache)

    def append(self, ids: Tensor, going: Tensor) -> None:
        """Append ids [n], which count only in the texts that are `going` [n]."""
        self._ids.copy_(torch.where(going, ids, self._ids))
        self._positions.add_(going)  # no position beyond the context for those that have ended
        self._slot.add_(1)


class _Loop:
    """The state of n completions, all of it tensors that stay where they are."""

    def __init__(
        self,
        writer: StaticWriter,
        law: SupportLaw,
        out: Draws,
        t: Tensor,
        u: Tensor,
        exploration: Exploration,
    ):
        self.writer, self.law, self.out, self.t, self.u = writer, law, out, t.clone(), u
        self.exploration, self.rows = exploration, torch.arange(len(t), device=t.device)
        self.node = law.nodes(out.tokens)[self.rows, t]
        self.alive = t <= law.last_state

    def step(self) -> None:
        """The next token or stop of every completion that goes on."""
        out, t, node, alive = self.out, self.t, self.node, self.alive
        step = self.law.step(self.writer.logits(), t, node)
        token = drawn(self.exploration, step, self.rows, self.rows, _at(self.u, t))
        stops = (token[:, None] == self.law.symbols).any(1) & alive
        goes = alive & ~stops
        place = t.clamp(max=out.tokens.shape[1] - 1)
        _put(out.log_pterm, t, step.log_stop, alive)
        _put(out.tokens, place, token, goes)
        _put(out.log_pf, place, _at(step.log_q, token), goes)
        out.lengths.copy_(torch.where(stops, t, out.lengths))
        out.stops.copy_(torch.where(stops, token, out.stops))
        node.copy_(torch.where(goes, self.law.advance(node, token), node))
        alive.copy_(goes & (t < self.law.last_state))
        t.add_(goes)
        self.writer.append(token, alive)


def static_pack(
    passes: Passes,
    law: SupportLaw,
    prefix: Prefix,
    index: Tensor,
    uniforms: Tensor,
    exploration: Exploration,
    kept: Draws | None,
    keep: Tensor | None,
    watch: Watch | None,
) -> Draws:
    """`decode_pack` in a static cache. With a `watch`, which the host calls after each token, and for prompts whose
    cache cannot be shared, it is the ordinary loop. Raises ConfigError for a tool and a sharded model."""
    if law.tool is not None:
        raise ConfigError("static_cache: a tool writes on the host: leave static_cache or the tool out")
    if shards_of(passes.model) is not None:
        raise ConfigError(
            "static_cache: passes of a sharded model meet on the host: leave static_cache or fsdp out"
        )
    out, begun = begin(law, index, kept, keep)
    start, rows = prefix, index
    if begun is not None:
        start, rows = passes.extend(prefix, index, begun), torch.arange(len(index), device=index.device)
    if watch is not None or not start.shared:
        return decode_pack(passes, law, prefix, index, uniforms, exploration, kept, keep, watch)
    t = torch.zeros_like(index) if keep is None else keep
    steps = law.last_state + 1 - int(t.min())
    if steps > 0:
        loop = _Loop(
            StaticWriter(passes, start, rows, steps), law, out, t, uniforms, exploration.to(index.device)
        )
        _run(loop, steps, passes)
    full = out.lengths == law.max_tokens
    out.log_pterm[:, -1] = torch.where(full, 0.0, out.log_pterm[:, -1])
    return out


def _run(loop: _Loop, steps: int, passes: Passes) -> None:
    step, captures = loop.step, _captures(loop.t.device)
    for k in range(steps):
        if k and k % PATIENCE == 0 and not bool(loop.alive.any()):
            return
        passes.pause()
        with pausing(None):  # what it does must not be captured
            if captures and k == 0:
                _on_the_side(step)
            elif captures and k == 1:
                step = _captured(step)
                step()
            else:
                step()


def _captures(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_the_side(step: Callable[[], None]) -> None:
    """Before a capture, on another stream: what is allocated once is then not a part of the graph."""
    side, now = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        step()
    now.wait_stream(side)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; capturing it does not run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _at(x: Tensor, column: Tensor) -> Tensor:
    """[n] x [n, W] at a column [n] of each row."""
    return x.gather(1, column[:, None])[:, 0]


def _put(x: Tensor, column: Tensor, value: Tensor, where: Tensor) -> None:
    """Write value [n] into a column [n] of each row of x [n, W], where [n] is True."""
    chosen = torch.where(where, value.to(x.dtype), _at(x, column))
    x.scatter_(1, column[:, None], chosen[:, None])
