"""What goes to a server of completions, and comes back: bytes of safetensors and JSON (docs/scale.md).

    GET  /info                  the model, and in which form the server takes weights
    PUT  /supports/{name}       the tables of a support; its name is the hash of the bytes
    PUT  /weights/{name}        weights of a policy; likewise
    POST /draw                  completions; answered by `Draws`

Errors are `{"error": "..."}`: 400 for what cannot be done, 410 for a support or weights that the server does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from amortlm.engine.decoding import Draws
from amortlm.engine.sampler import Request
from amortlm.errors import ConfigError, RolloutError
from amortlm.support.law import SupportLaw

ADAPTER, MERGED = "adapter", "merged"  # forms of weights: LoRA alone, or a whole model


@dataclass(frozen=True)
class About:
    """What a server says of itself. form: of the weights that it takes; tied: has its model one tensor for embeddings
    and output head? block: how many tokens its cache of prefixes remembers at once; room: tokens of a text."""

    model: str
    dtype: str
    vocab_size: int
    form: str
    tied: bool
    block: int
    room: int

    @property
    def packing(self) -> tuple[object, ...]:
        """What the bytes of weights depend on."""
        return (self.form,) if self.form == ADAPTER else (self.form, self.dtype, self.tied)


@dataclass(frozen=True)
class Named:
    """Bytes for a server, which keeps them under their hash: so a request is the same however often it is sent, and
    nothing is loaded over what draws or caches may still use."""

    data: bytes

    @cached_property
    def name(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def tables(law: SupportLaw) -> Named:
    """A support's tables. Raises ConfigError for a support with a tool, and for a guided or tempered law."""
    if law.tool is not None:
        raise ConfigError(
            "a server cannot draw on a support with a tool, whose code is here: leave the tool out, or draw locally"
        )
    if law.is_guided:
        raise ConfigError("a server does not look ahead: draw from a guided policy locally")
    if law.temperature != 1:
        raise ConfigError("a server draws from the law at temperature 1: draw from a tempered policy locally")
    tensors = {
        "stop_ids": torch.tensor(law.stop_ids),
        "lengths": torch.tensor([law.min_tokens, law.max_tokens]),
        "allowed": law.allowed.cpu(),
    }
    if law.automaton is not None:
        automaton = law.automaton.to(torch.device("cpu"))
        own = ("step", "token_class", "can", "ends")
        tensors |= {name: getattr(automaton, name) for name in own}
    return Named(save({name: x.contiguous() for name, x in tensors.items()}))


def adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Named:
    """An adapter in the form of PEFT: tensors by the names in its file, with adapter_config.json as metadata."""
    on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return Named(save(on_cpu, {"adapter_config": json.dumps(config)}))


def request_body(request: Request, support: str, weights: str) -> bytes:
    """The JSON of a request."""
    heat = None if request.exploration is None else request.exploration.temperature
    body = {
        "support": support,
        "weights": weights,
        "prompts": [list(prompt) for prompt in request.prompts],
        "counts": list(request.counts),
        "seeds": list(request.seeds),
        "temperature": None if heat is None else heat.tolist(),
        "epsilon": 0.0 if request.exploration is None else request.exploration.epsilon,
        "kept": None if request.kept is None else [list(z) for z in request.kept],
    }
    return json.dumps(body).encode()


def about(data: bytes) -> About:
    """The answer to /info. Raises ValueError if it is none."""
    try:
        info = json.loads(data)
        own = (str(info["model"]), str(info["dtype"]), int(info["vocab_size"]))
        room = (int(info["block_size"]), int(info["max_model_len"]))
        found = About(*own, str(info["weights"]), bool(info["tied"]), *room)
    except (KeyError, TypeError) as e:
        raise ValueError(str(e)) from e
    if found.form not in (ADAPTER, MERGED) or not isinstance(getattr(torch, found.dtype, None), torch.dtype):
        raise ValueError(f"weights {found.form} in {found.dtype}")
    return found


def draws(data: bytes, request: Request, version: int) -> Draws:
    """The draws in an answer. Raises RolloutError if it holds none, or other than were asked for."""
    try:
        found = load(data)
        out = Draws(**found, version=version)
    except (SafetensorError, TypeError) as e:
        raise RolloutError(
            f"the server's answer does not hold draws ({e}): see docs/scale.md for its version"
        ) from e
    count, width = sum(request.counts), out.tokens.shape[-1]
    shapes = {
        "tokens": (count, width),
        "lengths": (count,),
        "stops": (count,),
        "log_pf": (count, width),
        "log_pterm": (count, width + 1),
    }
    odd = [name for name, shape in shapes.items() if tuple(found[name].shape) != shape]
    if odd or not _legal(out, request):
        what = f"{odd[0]} of shape {tuple(found[odd[0]].shape)}" if odd else "tokens outside the support"
        raise RolloutError(f"the server's answer holds {what}: see docs/scale.md for its version")
    return out


def _legal(draws: Draws, request: Request) -> bool:
    """Are the draws in the support, and their log q numbers? What is not would spoil a training silently."""
    law = request.law
    if not bool(((draws.lengths >= 0) & (draws.lengths <= draws.tokens.shape[1])).all()):
        return False
    if not set(draws.stops.tolist()) <= set(law.stop_ids):
        return False
    known = all(
        law.contains(z[:n]) for z, n in zip(draws.tokens.tolist(), draws.lengths.tolist(), strict=True)
    )
    return known and bool(torch.isfinite(draws.log_q).all())
