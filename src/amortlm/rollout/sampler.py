"""A sampler that asks servers, for example vLLM with the wheel in servers/vllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from amortlm.engine.adapter import holding
from amortlm.engine.decoding import Draws, watched
from amortlm.engine.export import merged_file, plain_lora
from amortlm.engine.sampler import Request
from amortlm.errors import ConfigError
from amortlm.policy.policy import Policy
from amortlm.rollout import wire
from amortlm.rollout.ahead import Ahead, key_of
from amortlm.rollout.connection import Connection, Patience
from amortlm.rollout.fleet import Fleet
from amortlm.rollout.probe import check_delivery, probe
from amortlm.rollout.server import Server, Task
from amortlm.support.law import SupportLaw

# Nats: how far a server's log q of a token may be from the policy's (root mean square), by the server's precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}


class HTTPSampler:
    """Draws completions of a policy on servers (docs/scale.md). It implements `amortlm.engine.sampler.Sampler`.

    The servers have the frozen model; the policy's weights are sent to them here and at each `load`: LoRA alone, or, to
    servers that were started with --weights merged, all weights of the model with any adapter merged in. A server that
    was started again gets them again, and one that cannot be reached leaves its work to the others. Each prompt is
    a request of its own, to the server that has least to do; `ask` sends it before it is needed. reproducible: in
    float32; in lower precision the rounding of a server depends on what else is in its batch, and now and then turns a
    token into another.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        policy: Policy,
        *,
        patience: Patience | None = None,
        tolerance: float | None = None,
    ):
        """Connects, and loads the policy's present weights as version 0. servers: one address, or several.

        tolerance: nats, of the check at each load; default: by a server's precision. Raises ConfigError for a server
        with another model and for weights that it cannot load, RolloutError for one that fails.
        """
        urls = [servers] if isinstance(servers, str) else list(servers)
        if not urls:
            raise ConfigError("no servers: give at least one address like http://127.0.0.1:8000")
        self._policy, self.ahead = policy, Ahead()
        self._fleet = Fleet([Server(Connection(url, patience or Patience())) for url in urls])
        self._about = [self._checked(server.about()) for server in self._fleet.servers]
        if len({about.packing for about in self._about}) > 1:
            raise ConfigError(
                "the servers take weights in different forms: start all with the same --weights, --untied and --dtype"
            )
        dtypes = [about.dtype for about in self._about]
        self.reproducible = set(dtypes) == {"float32"}
        most = max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)
        self._tolerance = most if tolerance is None else tolerance
        # What is remembered of adapters is remembered under their names.
        block = max(about.block if about.form == wire.MERGED else 0 for about in self._about)
        self._probe = probe(policy, block, min(about.room for about in self._about))
        self._tables: tuple[SupportLaw, wire.Named] | None = None
        self._sent: tuple[Mapping[str, Tensor], list[Future[Draws | None]]] = ({}, [])
        self.load(policy.weights(), 0)

    def sample(self, request: Request) -> Draws:
        """`Sampler.sample`. Raises ConfigError for a support with a tool and for prompts that do not fit the servers'
        model, RolloutError if no server can be reached, and for answers that are no draws."""
        support, parts = self._support(request.law), []
        for one in request.each():
            known = self.ahead.take(key_of(one, support.name), one.counts[0])
            parts.append(self._drawing(one, support) if known is None else known)
        drawn = [part.result() if isinstance(part, Future) else part for part in parts]
        width = max(draws.tokens.shape[1] for draws in drawn)
        found = Draws.cat([draws.widened(width) for draws in drawn]).trimmed()
        if request.watch is not None:
            watched(found, request.law, request.watch)
        return found

    def ask(self, request: Request, due: int) -> None:
        """Have completions drawn from the present weights, which `sample` will return for the same request. due: the
        number of the update that needs them."""
        support = self._support(request.law)
        for one in request.each():
            key = key_of(one, support.name)
            if key not in self.ahead:
                self.ahead.put(key, self._drawing(one, support), due)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send the weights, and check that the servers draw from them. Raises ConfigError if they do not fit, or are of
        a kind that a server cannot load, RolloutError if one fails or draws from others."""
        self.send(weights, version)
        self.check()

    def send(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send the weights, and wait for nothing: what is drawn from now on is drawn from them, and `check` says later
        whether it was. Raises ConfigError if they do not fit."""
        own = {name: p.shape for name, p in self._policy.model.named_parameters() if p.requires_grad}
        if own != {name: w.shape for name, w in weights.items()}:
            raise ConfigError(
                "the weights belong to another policy: give those of the policy of this sampler"
            )
        self._packed = self._pack(weights)
        self.version = version
        task = Task(self._probe, wire.tables(self._probe.law), self._packed, version)

        def deliver(server: Server) -> Draws:
            server.load(task.weights)
            return server.draw(task)

        self._sent = (weights, self._fleet.everywhere(deliver))

    def check(self) -> None:
        """Do the servers draw from the weights that were sent last? Raises as `load` does."""
        weights, found = self._sent
        self._sent = ({}, [])
        for drawn in [future.result() for future in found]:
            if drawn is not None:
                check_delivery(self._policy, weights, self._probe, drawn, self._tolerance)

    def _drawing(self, request: Request, support: wire.Named) -> Future[Draws]:
        task = Task(request, support, self._packed, self.version)
        return self._fleet.submit(lambda server: server.draw(task))

    def _support(self, law: SupportLaw) -> wire.Named:
        if self._tables is None or self._tables[0] is not law:
            self._tables = (law, wire.tables(law))
        return self._tables[1]

    def _pack(self, weights: Mapping[str, Tensor]) -> wire.Named:
        """Weights in the form that the servers take."""
        model, about = self._policy.model, self._about[0]
        if about.form == wire.ADAPTER:
            return wire.adapter(*plain_lora(model, weights))
        with holding(model, weights):
            return wire.Named(
                merged_file(model, self._policy.lm.model, getattr(torch, about.dtype), about.tied)
            )

    def _checked(self, about: wire.About) -> wire.About:
        """Raises ConfigError for a model that has not the policy's vocabulary."""
        if about.vocab_size != self._policy.lm.vocab_size:
            raise ConfigError(
                f"the server's model, {about.model}, has {about.vocab_size} tokens, that of the policy "
                f"{self._policy.lm.vocab_size}: start it with the same"
            )
        return about
