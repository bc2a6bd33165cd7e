"""GFlowNet objectives as pure functions of the log importance weights.

    log_w[b, t] = log R(z_1:t) - sum_{k<=t} log q(z_k | z_<k) - log q(stop | z_1:t)

At q = R / Z every entry is log Z, so every objective and its gradient are zero (the gradient of forward_kl on draws
of the posterior: zero on average). Each takes log_w [B, T+1] and stop_mask [B, T+1] (entries outside are ignored) and
returns (loss, metrics): a scalar and a dict of floats. Losses are means over trajectories or groups, so a batch
split evenly over processes has the gradient of the whole. An objective never sees a model, a tokenizer or a task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amortlm.errors import DataError, RewardError
from amortlm.types import PolicyLogProbs
from amortlm.weights import log_mean_exp

Loss = tuple[Tensor, dict[str, float]]

OBJECTIVES = ("subtb", "db", "tb", "vargrad", "forward_kl")
EVERY_PREFIX_OBJECTIVES = ("subtb", "db")  # these compare the rewards of prefixes
GROUP_OBJECTIVES = ("vargrad", "forward_kl")  # these compare samples of one prompt, and know no log Z


def log_weights(log_reward: Tensor, log_probs: PolicyLogProbs, stop_mask: Tensor) -> Tensor:
    """log_w [B, T+1] (module docstring), 0 outside `stop_mask`.

    Raises RewardError where log_reward is not finite at a stopping state (see `targets.base.Softened`).
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
    """(log_w, stop_mask) with the empty completion as a state, for supports that do not let it stop.

    The flow through the root is log Z, so its log_w is log Z by definition. Without it `db` and `subtb` compare
    only states that share their first min_tokens tokens, and nothing says how likely those tokens should be.
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
    # Stopping states first, in order: tools leave gaps that neighbours reach across.
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
        raise DataError("vargrad compares samples of one prompt: it needs num_samples of at least 2")
    mean = final.new_zeros(len(size)).index_add(0, group, final) / size.clamp(min=1)
    squares = torch.zeros_like(mean).index_add(0, group, (final - mean[group]) ** 2)
    variance = squares / (size - 1).clamp(min=1)
    return variance[size > 0].mean(), {"log_z": mean.detach()[size > 0].mean().item()}


def forward_kl(log_w: Tensor, stop_mask: Tensor, group: Tensor, drawn_from_p: Tensor | None = None) -> Loss:
    """KL(p || q) by self-normalised importance weights: maximum likelihood on samples of q, weighted to p.

        sum_k (w_k - 1/K) log_w[tau_k],   w = softmax of the group's log_w[tau] (no gradient), mean over prompts

    d log_w = -d log q, so the gradient is an estimate of -E_p[grad log q] (Parshakova et al. 2019; f-DPG, Go et al.
    2023; the wake phase of Bornschein & Bengio 2015). E_q[grad log q] = 0, so 1/K changes nothing in expectation;
    it makes the gradient zero, not merely zero on average, where all weights are equal. The value estimates
    KL(p || q) + KL(q || p). Self-normalising at small K shortens the steps and keeps the optimum of an
    unrestricted q: the mean of w_k given tau_k = z rises with R(z) / q(z), so it is 1/K for all z only where q = R / Z.

    The weights R / q are right for samples of q alone. drawn_from_p [G] bool: prompts whose samples are draws of the
    posterior (`train.source`); these count 1/K each, and count as 0 in the value.
    Raises DataError for a prompt with a single sample.
    """
    final = final_log_w(log_w, stop_mask)
    size = torch.bincount(group)
    if (size == 1).any():
        raise DataError("forward_kl weighs samples of one prompt: it needs num_samples of at least 2")
    known = final.detach()
    share = (known - group_log_mean_exp(known, group)[group]).exp() - 1  # K w_k - 1
    if drawn_from_p is not None:
        share = torch.where(drawn_from_p[group], 1.0, share)
    # `share` sums to 0 over samples of q; over draws of p, centring takes log Z out of the value.
    centred = final - _group_mean(known, group)[group]
    return (share / size[group] * centred).sum() / (size > 0).sum(), {}


def group_log_mean_exp(values: Tensor, group: Tensor) -> Tensor:
    """[G] log of the mean of exp(values) within each group."""
    return torch.stack([log_mean_exp(values[group == g]) for g in range(int(group.max()) + 1)])


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    size = torch.bincount(group).clamp(min=1)
    return values.new_zeros(len(size)).index_add(0, group, values) / size


def subsample_states(stop_mask: Tensor, keep: int, generator: torch.Generator | None = None) -> Tensor:
    """stop_mask with at most `keep` random stopping states per trajectory, the last always among them.

    Every pair residual is zero at the optimum, so SubTB on a subset keeps its minimiser.
    """
    states = torch.arange(stop_mask.shape[1], device=stop_mask.device)
    score = torch.rand(stop_mask.shape, generator=generator).to(stop_mask.device)
    score = score.masked_fill(~stop_mask, -1.0)
    last = (states * stop_mask).amax(1, keepdim=True)
    score = score.masked_fill((states == last) & stop_mask, 2.0)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return stop_mask & (rank < keep)


def _mean_over_trajectories(total: Tensor, weight: Tensor) -> Loss:
    """Mean over trajectories of total / weight. Those without a pair count as zero."""
    per_trajectory = total / weight.clamp(min=torch.finfo(torch.float32).tiny)
    return per_trajectory.mean(), {"trajectories_without_pair": (weight == 0).sum().item()}
