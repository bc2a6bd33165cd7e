"""Tools that write into a completion: after the policy has written a trigger, the tool writes the next tokens.

A tool is part of the support. Its tokens are forced: policy and target give them log-probability 0, and a completion
cannot stop between them. The output of a tool depends only on the completion so far, so sampling, replay and
evaluation agree on which tokens are forced.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from amortlm.errors import ConfigError, SupportError, nearest

if TYPE_CHECKING:
    from amortlm.text.codec import Codec


REMEMBERED = 4096  # encoded outputs of a tool that are cached


class Tool(ABC):
    """Writes a text after a completion that ends with `trigger`."""

    trigger: str

    @abstractmethod
    def write(self, text: str) -> str:
        """The output after `text`, the completion so far, which ends with the trigger; "" for no output."""

    def to_spec(self) -> dict[str, Any]:
        """JSON form: {name: settings}. Raises ConfigError if the tool is not one of `TOOLS`."""
        name = next((name for name, kind in TOOLS.items() if type(self) is kind), None)
        if name is None:
            raise ConfigError(f"{self!r} cannot be saved by name; tools that can: {', '.join(TOOLS)}")
        return {name: asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Calculator(Tool):
    """Writes the result after "a + b =", and so for -, * and / without remainder. It reads only the last two operands,
    so the policy has to split a sum into steps (Hu et al. 2024, section 4.4)."""

    trigger = "="
    _STEP: ClassVar[re.Pattern[str]] = re.compile(r"(-?\d{1,15})\s*([-+*/])\s*(-?\d{1,15})\s*=$")

    def write(self, text: str) -> str:
        step = self._STEP.search(text)
        if step is None:
            return ""
        a, b = int(step[1]), int(step[3])
        match step[2]:
            case "+":
                return f" {a + b}"
            case "-":
                return f" {a - b}"
            case "*":
                return f" {a * b}"
        return f" {a // b}" if b and a % b == 0 else ""


@dataclass(frozen=True)
class Lookup(Tool):
    """Writes table[key] after a key and the trigger; of several keys that fit, the longest counts. Without a fitting
    key it writes nothing."""

    table: Mapping[str, str]
    trigger: str = ":"  # type: ignore[misc]

    def __post_init__(self) -> None:
        texts = [*self.table, *self.table.values()] if isinstance(self.table, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"lookup: table must be a mapping of text to text, got {self.table!r}")
        if not (isinstance(self.trigger, str) and self.trigger):
            raise ConfigError(f"lookup: trigger must be text, got {self.trigger!r}")

    def write(self, text: str) -> str:
        asked = text.removesuffix(self.trigger).rstrip()
        keys = [key for key in self.table if re.search(rf"(^|\W){re.escape(key)}$", asked)]
        return f" {self.table[max(keys, key=len)]}" if keys else ""


TOOLS: dict[str, type[Tool]] = {"calculator": Calculator, "lookup": Lookup}


def tool_from_spec(spec: Tool | str | Mapping[str, Any]) -> Tool:
    """A tool from its JSON form: "calculator", {"lookup": {"table": {...}}}. Raises ConfigError for another form."""
    if isinstance(spec, Tool):
        return spec
    if not isinstance(spec, str | Mapping):
        raise ConfigError(
            f"tool must be a name or a mapping such as {{lookup: {{table: ...}}}}, got {spec!r}"
        )
    name, settings = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()), ("", {}))
    if name not in TOOLS:
        raise ConfigError(f"unknown tool {name!r}; {nearest(name, TOOLS)}")
    try:
        return TOOLS[name](**(settings or {}))
    except TypeError as e:
        raise ConfigError(f"tool {name}: {e}") from None


class BoundTool:
    """A tool as a state machine over a model's tokens."""

    def __init__(self, tool: Tool, codec: Codec, stop_ids: Sequence[int]):
        self.tool, self.codec, self.stop_ids = tool, codec, set(stop_ids)
        ends = [codec.decode([i]).endswith(tool.trigger[-1]) for i in range(len(codec.tokenizer))]
        ends += [False] * (codec.vocab_size - len(ends))
        self.may_trigger = torch.tensor(ends)  # [V]: the tokens after which the text can end with the trigger
        self._encoded: dict[str, list[int]] = {}

    def result(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that the tool writes after `tokens`, the last of which the policy chose."""
        if not tokens or not self.may_trigger[tokens[-1]]:
            return []
        text = self.codec.decode(tokens)
        return self._encode(self.tool.write(text)) if text.endswith(self.tool.trigger) else []

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            ids = self.codec.encode_continuation(text)
            if self.stop_ids & set(ids):
                raise SupportError(
                    f"{self.tool!r} wrote {text!r}, which contains a stop symbol; use another stop symbol"
                )
            if len(self._encoded) >= REMEMBERED:
                self._encoded.clear()
            self._encoded[text] = ids
        return list(self._encoded[text])

    def forced(self, tokens: Sequence[int]) -> list[bool] | None:
        """For each token of a completion: did the tool write it? None if the tool would have written other tokens."""
        out: list[bool] = []
        pending: list[int] = []
        for t, token in enumerate(tokens):
            if pending and token != pending[0]:
                return None
            out.append(bool(pending))
            pending = pending[1:] if pending else self.result(tokens[: t + 1])
        return out

    def inside(self, tokens: Sequence[int]) -> bool:
        """Does the completion end in the middle of what the tool writes?"""
        forced = self.forced(tokens)
        if forced is None:
            return False
        own = max((t for t, f in enumerate(forced) if not f), default=-1) + 1
        return len(self.result(tokens[:own])) > len(tokens) - own


class ToolRun:
    """The tokens that a tool still has to write, for each of B trajectories that are being sampled."""

    def __init__(self, tool: BoundTool, batch: int):
        self.tool = tool
        self._pending: list[list[int]] = [[] for _ in range(batch)]

    def forced(self, alive: Tensor) -> Tensor:
        """[b] the token that must come next at each trajectory of `alive` [b]; -1 where the policy is free."""
        return torch.tensor([(self._pending[i] or [-1])[0] for i in alive.tolist()], device=alive.device)

    def advance(self, alive: Tensor, tokens: Tensor, t: Tensor) -> None:
        """Update after token t [b] of each trajectory of `alive` [b] was written (tokens [B, T]): one output token
        less is left, or the tool is called."""
        triggered = self.tool.may_trigger[tokens[alive, t].cpu()].tolist()
        for i, last, may in zip(alive.tolist(), t.tolist(), triggered, strict=True):
            if self._pending[i]:
                del self._pending[i][0]
            elif may:
                self._pending[i] = self.tool.result(tokens[i, : last + 1].tolist())
