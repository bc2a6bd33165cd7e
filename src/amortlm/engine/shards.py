"""Models of which each process holds a part (FSDP2), and the passes that all processes make together.

A pass of a sharded model gathers its weights, block by block, from all processes: all must make it, or none can. But
processes have different numbers of passes, because completions differ in length. So each pass begins with a round, in
which every process says what it needs. What one of them needs, all do; those that do not need it join with a pass over
one token, and throw away what it gives. A process that waits for the others (`Shards.serve`) joins until nobody needs
anything. Nothing else changes: draws, packs and searches are those of a whole model.

With LoRA there is one sharded model: p is the model with its adapter switched off. A full copy is beside p.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What the processes need, each a list of numbers -> the sums over all processes.
Agree = Callable[[Sequence[int]], list[int]]


class Shards:
    """The rounds of the sharded models of one run: the first is the policy's, the other, if any, is p."""

    def __init__(self, models: Sequence[Any], agree: Agree):
        self._models, self._agree = list(models), agree
        for model in models:
            model.shards = self

    def logits(self, model: Any, arguments: dict[str, Any]) -> Tensor:
        """A pass of one of the models, or of `Frozen`."""
        found: list[Tensor] = []
        number = self._models.index(getattr(model, "adapted", model))
        self._round(number, lambda: found.append(model(**arguments).logits))
        return found[0]

    def weights(self) -> dict[str, Tensor]:
        """The whole trained weights of the policy's model, by name, on the CPU."""
        found: dict[str, Tensor] = {}
        self._round(len(self._models), lambda: found.update(self._gather(keep=True)))
        return found

    def serve(self) -> None:
        """Join in what other processes need, until all are here."""
        while self._round(None, lambda: None):
            pass

    def _round(self, own: int | None, action: Callable[[], None]) -> bool:
        """Do what this process needs (a number of a model; one more: the weights), and join in what others need. Does
        any process need anything?"""
        needs = self._agree([int(i == own) for i in range(len(self._models) + 1)])
        for i, count in enumerate(needs):
            if count and i == own:
                action()
            elif count:
                self._join(i)
        return any(needs)

    @torch.no_grad()
    def _join(self, number: int) -> None:
        if number == len(self._models):
            self._gather(keep=False)
            return
        model = self._models[number]
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)

    @torch.no_grad()
    def _gather(self, keep: bool) -> dict[str, Tensor]:
        """One tensor at a time."""
        found = {}
        for name, p in self._models[0].named_parameters():
            if p.requires_grad:
                whole = p.full_tensor()
                if keep:
                    found[name] = whole.cpu().clone()
        return found


class Frozen:
    """p, inside a model with a plain LoRA: each pass switches the adapter off."""

    def __init__(self, adapted: Any, original: Any):
        """original: the frozen model, whose name and config are kept."""
        self.adapted, self.config, self.name_or_path = adapted, original.config, original.name_or_path
        self._base = adapted.get_base_model()
        self._layers = [m for m in adapted.modules() if hasattr(m, "_disable_adapters")]

    @property
    def shards(self) -> Shards:
        return shards_of(self.adapted)  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name in ("adapted", "_base"):  # not there yet: it is being copied
            raise AttributeError(name)
        return getattr(self._base, name)

    def __call__(self, **arguments: Any) -> Any:
        with self._switched_off():
            return self.adapted(**arguments)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.adapted.parameters() if not p.requires_grad)

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        # Not by peft's disable_adapter, which also changes what requires gradients.
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False


def shards_of(model: Any) -> Shards | None:
    """Of a sharded model; None if this process holds the model whole."""
    if isinstance(model, Frozen):
        model = model.adapted
    found = getattr(model, "__dict__", {}).get("shards")
    return found if isinstance(found, Shards) else None


def distribute(model: Any, blocks: Collection[str], mesh: DeviceMesh) -> None:
    """Leave this process its part of each weight. blocks: classes of the modules whose weights are gathered at once;
    what is outside of them is gathered for a whole pass."""
    from torch.distributed.fsdp import fully_shard

    for module in (*[m for m in model.modules() if type(m).__name__ in blocks], model):
        # Gathered anew in each pass: what was left of the pass before would be the weights before an update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def original_class(model: Any) -> Any:
    """The class of a model, also if it was sharded, which changes it."""
    if shards_of(model) is None:
        return type(model)
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@torch.no_grad()
def put(own: Any, value: Tensor) -> None:
    """Copy a whole tensor into a weight, of which this process may hold a part. Raises ValueError for another shape."""
    if own.shape != value.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} where {tuple(own.shape)} is expected")
    if _is_part(own):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(own.device, own.dtype)
        value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(value)


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The state of a sharded model with its trained weights whole; None if this process holds the model whole."""
    shards = shards_of(model)
    if shards is None:
        return None
    weights, names = shards.weights(), {id(p): name for name, p in model.named_parameters()}
    twice = model.named_parameters(remove_duplicate=False)  # tied weights have several names
    return model.state_dict() | {name: weights[names[id(p)]] for name, p in twice if p.requires_grad}


def local(state: Any) -> Any:
    """A nested state with this process's parts in place of sharded tensors."""
    if isinstance(state, dict):
        return {key: local(value) for key, value in state.items()}
    if isinstance(state, list):
        return [local(value) for value in state]
    return state.to_local() if _is_part(state) else state


def sharded_as(weight: Any, part: Any) -> Any:
    """The inverse of `local` for one tensor of a weight's optimizer state. Raises ValueError for another shape."""
    if not _is_part(weight) or not isinstance(part, Tensor) or part.dim() == 0:
        return part
    from torch.distributed.tensor import DTensor

    own = weight.to_local()
    if part.shape != own.shape:
        raise ValueError(f"a part of shape {tuple(part.shape)} where {tuple(own.shape)} is expected")
    part, layout = part.to(own.device), (weight.device_mesh, weight.placements)
    return DTensor.from_local(part, *layout, shape=weight.shape, stride=weight.stride(), run_check=False)


def _is_part(x: Any) -> bool:
    return hasattr(x, "to_local")
