"""The records of the objectives: what training has to know of each, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from amortlm.errors import ConfigError, nearest
from amortlm.objectives.formulas import (
    Loss,
    alpha_divergence,
    db,
    forward_kl,
    prefix_tb,
    subsample_states,
    subtb,
    tb,
    vargrad,
    with_root,
)
from amortlm.settings import check_keys, typed


@dataclass(frozen=True)
class LossInputs:
    """The arguments of an objective's loss: B trajectories of N prompts.

    log_w           [B, T+1]  log importance weights, nats; 0 outside stop_mask
    stop_mask       [B, T+1]  bool: the stopping states that count
    group           [B] long  the prompt of each trajectory
    log_z           [N]       log Z of each prompt, nats, if the objective learns it
    from_posterior  [N] bool  prompts whose completions include corrected samples
    """

    log_w: Tensor
    stop_mask: Tensor
    group: Tensor
    log_z: Tensor | None = None
    from_posterior: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The record of an objective: its name, loss and requirements. Each is a frozen dataclass; its fields are settings.

    every_prefix    does it compare rewards of prefixes? Then the target must be able to score unfinished text
    biased_by       behaviours (names of `GFNConfig.behaviour`), and fields of `GFNConfig`, that move its optimum
    posterior_only  does it treat corrected completions as draws of the posterior? Then all completions of a corrected
                    prompt are corrected; else half of them, which are compared with fresh ones

    Raises ConfigError for invalid settings.
    """

    name: ClassVar[str]
    every_prefix: ClassVar[bool] = False
    biased_by: ClassVar[tuple[str, ...]] = ()
    posterior_only: ClassVar[bool] = False

    @property
    def min_samples(self) -> int:
        """The least number of completions of a prompt."""
        return 1

    @property
    def log_z_rate(self) -> float | None:
        """The learning rate of log Z of each prompt; None if log Z is not learned."""
        return None

    def kept_states(self, stop_mask: Tensor, generator: torch.Generator) -> Tensor:
        """[B, T+1] bool: the stopping states that it uses; only these are scored."""
        return stop_mask

    def loss(self, inputs: LossInputs) -> Loss:
        """(the loss as a scalar, figures for the log)."""
        raise NotImplementedError

    @property
    def stated(self) -> str | dict[str, dict[str, Any]]:
        """The form that `parse` reads: its name, with the settings that differ from the default."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: own[f.name] for f in fields(self) if own[f.name] != f.default}
        return {self.name: changed} if changed else self.name


OBJECTIVES: dict[str, type[Objective]] = {}


def register(record: type[Objective]) -> type[Objective]:
    """Add an objective to `OBJECTIVES` under its name."""
    OBJECTIVES[record.name] = record
    return record


def parse(given: Any) -> Objective:
    """The objective from a name, or {name: {setting: value, ...}}. Raises ConfigError for unknown names or settings."""
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ConfigError(
            f"objective is a name, or a name with its settings such as {{'subtb': {{'lam': 0.9}}}}, not {given!r}"
        )
    ((name, settings),) = given.items()
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}; {nearest(str(name), OBJECTIVES)}")
    record, where = OBJECTIVES[name], f"objective {name}"
    settings = {} if settings is None else settings
    check_keys(settings, [f.name for f in fields(record)], where)
    return record(**typed(settings, record, where))


@dataclass(frozen=True)
class _WithLogZ(Objective):
    """log_z: log Z of a prompt is estimated from the "group" of its samples, or "learned" at log_z_learning_rate."""

    log_z: Literal["group", "learned"] = "group"
    log_z_learning_rate: float = 0.1

    @property
    def min_samples(self) -> int:
        return 2 if self.log_z == "group" else 1

    @property
    def log_z_rate(self) -> float | None:
        return self.log_z_learning_rate if self.log_z == "learned" else None


@dataclass(frozen=True)
class _OnStates(_WithLogZ):
    """states: number of random stopping states used of each completion (None: all)."""

    every_prefix = True
    states: int | None = None

    def __post_init__(self) -> None:
        if self.states is not None and self.states < 2:
            raise ConfigError(
                f"objective {self.name}: states must be at least 2, got {self.states}: it compares states of a "
                "completion"
            )

    def kept_states(self, stop_mask: Tensor, generator: torch.Generator) -> Tensor:
        return stop_mask if self.states is None else subsample_states(stop_mask, self.states, generator)


@register
@dataclass(frozen=True)
class SubTB(_OnStates):
    """Sub-trajectory balance (`subtb`). lam: decay of a pair's weight with its distance. log Z is used only at the
    root, if min_tokens > 0."""

    name = "subtb"
    lam: float = 1.0

    def loss(self, inputs: LossInputs) -> Loss:
        return subtb(*with_root(inputs.log_w, inputs.stop_mask, inputs.group, inputs.log_z), self.lam)


@register
@dataclass(frozen=True)
class DB(_WithLogZ):
    """Detailed balance (`db`). log Z is used only at the root, if min_tokens > 0."""

    name = "db"
    every_prefix = True

    def loss(self, inputs: LossInputs) -> Loss:
        return db(*with_root(inputs.log_w, inputs.stop_mask, inputs.group, inputs.log_z))


@register
@dataclass(frozen=True)
class TB(_WithLogZ):
    name = "tb"

    def loss(self, inputs: LossInputs) -> Loss:
        return tb(inputs.log_w, inputs.stop_mask, inputs.group, inputs.log_z)


@register
@dataclass(frozen=True)
class PrefixTB(_OnStates):
    """Trajectory balance of every prefix (`prefix_tb`)."""

    name = "prefix_tb"

    def loss(self, inputs: LossInputs) -> Loss:
        return prefix_tb(inputs.log_w, inputs.stop_mask, inputs.group, inputs.log_z)


class _OfGroup(Objective):
    """An objective that compares the samples of one prompt and does not use log Z."""

    @property
    def min_samples(self) -> int:
        return 2


@register
@dataclass(frozen=True)
class VarGrad(_OfGroup):
    """`vargrad`. huber: differences of two log weights beyond this many nats count linearly (None: all squared)."""

    name = "vargrad"
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.huber is not None and self.huber <= 0:
            raise ConfigError(f"objective vargrad: huber must be a number of nats above 0, got {self.huber}")

    def loss(self, inputs: LossInputs) -> Loss:
        return vargrad(inputs.log_w, inputs.stop_mask, inputs.group, self.huber)


@register
@dataclass(frozen=True)
class ForwardKL(_OfGroup):
    name = "forward_kl"
    # The weights R / q are right only for samples of q.
    biased_by = ("tempered", "replay", "prior", "epsilon", "max_staleness")
    posterior_only = True

    def loss(self, inputs: LossInputs) -> Loss:
        return forward_kl(inputs.log_w, inputs.stop_mask, inputs.group, inputs.from_posterior)


@register
@dataclass(frozen=True)
class Alpha(_OfGroup):
    """The alpha-divergence (`alpha_divergence`). alpha: 1 is forward_kl on samples of any behaviour; near 0, reverse KL
    (vargrad)."""

    name = "alpha"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ConfigError(
                f"objective alpha: alpha must be above 0, got {self.alpha}; its limit at 0 is objective='vargrad'"
            )

    def loss(self, inputs: LossInputs) -> Loss:
        return alpha_divergence(inputs.log_w, inputs.stop_mask, inputs.group, self.alpha)
