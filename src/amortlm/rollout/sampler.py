"""A sampler that asks a server, for example vLLM with the wheel in servers/vllm."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from amortlm.engine.adapter import plain_lora
from amortlm.engine.decoding import Draws
from amortlm.engine.sampler import Request
from amortlm.errors import ConfigError, RolloutError
from amortlm.policy.policy import Policy
from amortlm.rollout import wire
from amortlm.rollout.connection import Connection, Patience, UnknownError
from amortlm.rollout.probe import check_delivery

# Nats: how far the server's log q of a token may be from the policy's (root mean square), by the server's precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}
FORGETFUL = 3  # times that a server may start again during one request


class HTTPSampler:
    """Draws completions of a policy on a server (docs/scale.md). It implements `amortlm.engine.sampler.Sampler`.

    The server has the frozen model; the policy's weights, LoRA alone, are sent to it here and at each `load`. A server
    that was started again gets them again. reproducible: in float32; in lower precision the rounding of the server
    depends on what else is in its batch, and now and then turns a token into another.
    """

    def __init__(
        self, url: str, policy: Policy, *, patience: Patience | None = None, tolerance: float | None = None
    ):
        """Connects, and loads the policy's present weights as version 0.

        tolerance: nats, of the check at each load; default: by the server's precision. Raises ConfigError for a server
        with another model and for weights that it cannot load, RolloutError for a server that fails.
        """
        self._connection, self._policy = Connection(url, patience or Patience()), policy
        dtype = self._precision()
        self.reproducible = dtype == "float32"
        self._tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values())) if tolerance is None else tolerance
        self._supports: set[str] = set()  # that the server has
        self.load(policy.weights(), 0)

    def sample(self, request: Request) -> Draws:
        """`Sampler.sample`. Raises ConfigError for a support with a tool and for prompts that do not fit the server's
        model, RolloutError for a server that fails."""
        support, data = wire.tables(request.law)
        body = wire.request_body(request, support, self._adapter)
        for _ in range(FORGETFUL):
            try:
                if support not in self._supports:
                    self._connection.call("PUT", f"/supports/{support}", data)
                    self._supports.add(support)
                return wire.draws(self._connection.call("POST", "/draw", body), request, self.version)
            except UnknownError:
                self._supports.clear()
                self._connection.call("PUT", f"/adapters/{self._adapter}", self._weights)
        raise RolloutError(f"{self._connection.url} forgets what it is given: give it a higher --keep")

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send the weights, and check that the server draws from them. Raises ConfigError if they do not fit, or are of
        a kind that the server cannot load, RolloutError if it fails or draws from others."""
        own = {name: p.shape for name, p in self._policy.model.named_parameters() if p.requires_grad}
        if own != {name: w.shape for name, w in weights.items()}:
            raise ConfigError(
                "the weights belong to another policy: give those of the policy of this sampler"
            )
        data = wire.weights(*plain_lora(self._policy.model, weights))
        adapter = wire.name_of(data)
        self._connection.call("PUT", f"/adapters/{adapter}", data)
        self._adapter, self._weights, self.version = adapter, data, version
        check_delivery(self._policy, weights, self.sample, self._tolerance)

    def _precision(self) -> str:
        """The dtype of the server's model, which has to have the policy's vocabulary."""
        answer, size = self._connection.call("GET", "/info"), self._policy.lm.vocab_size
        try:
            info = json.loads(answer)
            name, dtype, vocab = str(info["model"]), str(info["dtype"]), int(info["vocab_size"])
        except (ValueError, KeyError, TypeError) as e:
            raise RolloutError(
                f"{self._connection.url} does not answer like a server of completions: start one as docs/scale.md says"
            ) from e
        if vocab != size:
            raise ConfigError(
                f"the server's model, {name}, has {vocab} tokens, that of the policy {size}: start it with the same"
            )
        return dtype
