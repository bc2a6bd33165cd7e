"""GFlowNet objectives: pure functions of the log importance weights, and the records that training uses.

    log_w[b, t] = log R(z_1:t) - sum_{k<=t} log q(z_k | z_<k) - log q(stop | z_1:t)

At q = R / Z every entry is log Z, so every objective and its gradient are zero (the gradient of forward_kl on draws
of the posterior: zero on average). Each takes log_w [B, T+1] and stop_mask [B, T+1] (entries outside are ignored) and
returns (loss, metrics): a scalar and a dict of floats. Losses are means over trajectories or groups, so a batch
split evenly over processes has the gradient of the whole. An objective never sees a model, a tokenizer or a task.

To add an objective, write its function, and a record (`Objective`) with the decorator `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from amortlm.errors import ConfigError, DataError, RewardError, nearest
from amortlm.settings import check_keys, typed
from amortlm.types import PolicyLogProbs
from amortlm.weights import log_mean_exp

Loss = tuple[Tensor, dict[str, float]]

# Formulas


def log_weights(log_reward: Tensor, log_probs: PolicyLogProbs, stop_mask: Tensor) -> Tensor:
    """log_w [B, T+1] (module docstring), 0 outside `stop_mask`.

    log_reward, stop_mask [B, T+1]; nats. Raises RewardError if log_reward is not finite at a stopping state (see
    `targets.base.Softened`).
    """
    if not torch.isfinite(log_reward[stop_mask]).all():
        raise RewardError(
            "a log reward is not finite; wrap the target in Softened to train on hard constraints"
        )
    log_pf = torch.nn.functional.pad(log_probs.log_pf, (1, 0)).cumsum(1)
    log_w = log_reward - log_pf - log_probs.log_pterm
    return torch.where(stop_mask, log_w, 0.0)


def final_log_w(log_w: Tensor, stop_mask: Tensor) -> Tensor:
    """log_w [B] at the last stopping state of each trajectory: the importance weight of the sample."""
    states = torch.arange(log_w.shape[1], device=log_w.device)
    last = (states * stop_mask).argmax(1, keepdim=True)
    return log_w.gather(1, last).squeeze(1)


def with_root(
    log_w: Tensor, stop_mask: Tensor, group: Tensor, log_z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log_w, stop_mask) with the empty completion as an additional state, for supports in which it may not stop.

    The flow through the root is log Z, so its log_w is log Z by definition. Without the root, `db` and `subtb` compare
    only states that share their first min_tokens tokens, and the loss does not depend on the probability of these.
    group [B]: prompt of each trajectory; log_z [G], or None for the mean of final log_w in the group (no gradient).
    """
    if log_z is None:
        log_z = _group_mean(final_log_w(log_w, stop_mask).detach(), group)
    root = torch.where(stop_mask[:, 0], log_w[:, 0], log_z[group])
    with_state = torch.cat([torch.ones_like(stop_mask[:, :1]), stop_mask[:, 1:]], dim=1)
    return torch.cat([root[:, None], log_w[:, 1:]], dim=1), with_state


def db(log_w: Tensor, stop_mask: Tensor) -> Loss:
    """Detailed balance when every state can stop: mean squared difference of neighbouring stopping states
    (Deleu et al. 2022, eq. 8; the pairs j = i + 1 of Hu et al. 2024, eq. 3)."""
    # Stopping states first, in order: with a tool, neighbouring stopping states may be several tokens apart.
    order = stop_mask.int().argsort(dim=1, descending=True, stable=True)
    ordered, valid = log_w.gather(1, order), stop_mask.gather(1, order)
    pair = valid[:, 1:]
    squares = torch.where(pair, ordered.diff(dim=1) ** 2, 0.0)
    return _mean_over_trajectories(squares.sum(1), pair.sum(1))


def subtb(log_w: Tensor, stop_mask: Tensor, lam: float = 1.0) -> Loss:
    """Sub-trajectory balance (Madan et al. 2023; Hu et al. 2024, eq. 3), lambda-weighted:

        sum_{i<j} lam^(j-i-1) (log_w[j] - log_w[i])^2 / sum_{i<j} lam^(j-i-1)

    over pairs of stopping states. O(T) for lam = 1, O(T^2) else.
    """
    n = stop_mask.sum(1)
    log_w = torch.where(stop_mask, log_w, 0.0)
    if lam == 1.0:
        # sum_{i<j} (a_i - a_j)^2 = n * sum (a - mean)^2
        mean = log_w.sum(1, keepdim=True) / n.clamp(min=1)[:, None]
        squares = n * torch.where(stop_mask, (log_w - mean) ** 2, 0.0).sum(1)
        return _mean_over_trajectories(squares, n * (n - 1) / 2)
    states = torch.arange(log_w.shape[1], device=log_w.device)
    distance = states - states[:, None]
    weight = torch.where(distance > 0, lam ** (distance - 1).clamp(min=0).float(), 0.0)
    weight = weight * stop_mask[:, :, None] * stop_mask[:, None, :]
    squares = (log_w[:, None, :] - log_w[:, :, None]) ** 2
    return _mean_over_trajectories((weight * squares).sum((1, 2)), weight.sum((1, 2)))


def tb(log_w: Tensor, stop_mask: Tensor, group: Tensor, log_z: Tensor | None = None) -> Loss:
    """Trajectory balance (Malkin et al. 2022): mean of (log_w[tau] - log Z)^2.

    group [B] long: prompt of each trajectory. log_z [G]: learned log Z of each prompt; when None it is estimated
    from the group's own importance weights (log-mean-exp, no gradient), a consistent estimate for samples of q.
    """
    final = final_log_w(log_w, stop_mask)
    if log_z is None:
        log_z = group_log_mean_exp(final.detach(), group)
    loss = ((final - log_z[group]) ** 2).mean()
    return loss, {"log_z": log_z.detach().mean().item()}


def vargrad(log_w: Tensor, stop_mask: Tensor, group: Tensor) -> Loss:
    """VarGrad / log-variance (Richter et al. 2020): unbiased variance of log_w[tau] among a prompt's
    samples, averaged over prompts. Raises DataError for a prompt with a single sample."""
    final = final_log_w(log_w, stop_mask)
    size = torch.bincount(group)
    if (size == 1).any():
        raise DataError("vargrad compares samples of one prompt: num_samples must be at least 2")
    mean = final.new_zeros(len(size)).index_add(0, group, final) / size.clamp(min=1)
    squares = torch.zeros_like(mean).index_add(0, group, (final - mean[group]) ** 2)
    variance = squares / (size - 1).clamp(min=1)
    return variance[size > 0].mean(), {"log_z": mean.detach()[size > 0].mean().item()}


def forward_kl(log_w: Tensor, stop_mask: Tensor, group: Tensor, drawn_from_p: Tensor | None = None) -> Loss:
    """KL(p || q) by self-normalised importance weights: maximum likelihood on samples of q with weights p / q.

        sum_k (w_k - 1/K) log_w[tau_k],   w = softmax of the group's log_w[tau] (no gradient), mean over prompts

    d log_w = -d log q, so the gradient is an estimate of -E_p[grad log q] (Parshakova et al. 2019; f-DPG, Go et al.
    2023; the wake phase of Bornschein & Bengio 2015). E_q[grad log q] = 0, so the term 1/K does not change the
    expected gradient. With this term the gradient is exactly zero, not only on average, if all weights are equal. The
    value estimates KL(p || q) + KL(q || p). Self-normalising at small K shortens the steps, but keeps the optimum of an
    unrestricted q: the mean of w_k given tau_k = z rises with R(z) / q(z), so it is 1/K for all z only if q = R / Z.

    The weights R / q are right only for samples of q. drawn_from_p [G] bool: prompts whose samples are draws of the
    posterior (`train.source`); each of these samples has weight 1/K, and the value 0.
    Raises DataError for a prompt with a single sample.
    """
    final = final_log_w(log_w, stop_mask)
    size = torch.bincount(group)
    if (size == 1).any():
        raise DataError("forward_kl compares samples of one prompt: num_samples must be at least 2")
    known = final.detach()
    share = (known - group_log_mean_exp(known, group)[group]).exp() - 1  # K w_k - 1
    if drawn_from_p is not None:
        share = torch.where(drawn_from_p[group], 1.0, share)
    # `share` sums to 0 over samples of q. For draws of p, centring removes log Z from the value.
    centred = final - _group_mean(known, group)[group]
    return (share / size[group] * centred).sum() / (size > 0).sum(), {}


def group_log_mean_exp(values: Tensor, group: Tensor) -> Tensor:
    """[G] log of the mean of exp(values) within each group."""
    return torch.stack([log_mean_exp(values[group == g]) for g in range(int(group.max()) + 1)])


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    size = torch.bincount(group).clamp(min=1)
    return values.new_zeros(len(size)).index_add(0, group, values) / size


def subsample_states(stop_mask: Tensor, keep: int, generator: torch.Generator | None = None) -> Tensor:
    """stop_mask with at most `keep` random stopping states per trajectory, always including the last.

    Every pair residual is zero at the optimum, so SubTB on a subset of states has the same optimum.
    """
    states = torch.arange(stop_mask.shape[1], device=stop_mask.device)
    score = torch.rand(stop_mask.shape, generator=generator).to(stop_mask.device)
    score = score.masked_fill(~stop_mask, -1.0)
    last = (states * stop_mask).amax(1, keepdim=True)
    score = score.masked_fill((states == last) & stop_mask, 2.0)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return stop_mask & (rank < keep)


def spread(log_w: Tensor, stop_mask: Tensor, group: Tensor) -> dict[str, float]:
    """Means over the prompts of the batch, for the log: `log_z`, the mean of a prompt's final log_w in nats, and
    `log_w_variance`, their variance in nats squared. Needs at least two samples of each prompt."""
    final = final_log_w(log_w, stop_mask)
    variance, metrics = vargrad(final[:, None], torch.ones_like(final[:, None], dtype=torch.bool), group)
    return {**metrics, "log_w_variance": variance.item()}


def _mean_over_trajectories(total: Tensor, weight: Tensor) -> Loss:
    """Mean over trajectories of total / weight. Trajectories without a pair of states count as zero."""
    per_trajectory = total / weight.clamp(min=torch.finfo(torch.float32).tiny)
    return per_trajectory.mean(), {"trajectories_without_pair": (weight == 0).sum().item()}


# Records


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


@register
@dataclass(frozen=True)
class SubTB(_WithLogZ):
    """Sub-trajectory balance (`subtb`). lam: decay of a pair's weight with its distance. states: number of random
    stopping states used of each completion (None: all). log Z is used only at the root, if min_tokens > 0."""

    name = "subtb"
    every_prefix = True
    lam: float = 1.0
    states: int | None = None

    def __post_init__(self) -> None:
        if self.states is not None and self.states < 2:
            raise ConfigError(
                f"objective subtb: states must be at least 2, got {self.states}: a residual compares two states"
            )

    def kept_states(self, stop_mask: Tensor, generator: torch.Generator) -> Tensor:
        return stop_mask if self.states is None else subsample_states(stop_mask, self.states, generator)

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


class _OfGroup(Objective):
    """An objective that compares the samples of one prompt and does not use log Z."""

    @property
    def min_samples(self) -> int:
        return 2


@register
@dataclass(frozen=True)
class VarGrad(_OfGroup):
    name = "vargrad"

    def loss(self, inputs: LossInputs) -> Loss:
        return vargrad(inputs.log_w, inputs.stop_mask, inputs.group)


@register
@dataclass(frozen=True)
class ForwardKL(_OfGroup):
    name = "forward_kl"
    # The weights R / q are right only for samples of q.
    biased_by = ("tempered", "replay", "prior", "epsilon", "max_staleness")
    posterior_only = True

    def loss(self, inputs: LossInputs) -> Loss:
        return forward_kl(inputs.log_w, inputs.stop_mask, inputs.group, inputs.from_posterior)
