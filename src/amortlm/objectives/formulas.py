"""The losses: pure functions of the log importance weights (see the package)."""

from __future__ import annotations

import torch
from torch import Tensor

from amortlm.errors import DataError, RewardError
from amortlm.types import PolicyLogProbs
from amortlm.weights import log_mean_exp

Loss = tuple[Tensor, dict[str, float]]


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


def prefix_tb(log_w: Tensor, stop_mask: Tensor, group: Tensor, log_z: Tensor | None = None) -> Loss:
    """Trajectory balance of every prefix that can stop: mean over trajectories of the mean over their stopping states
    of (log_w[t] - log Z)^2. Each residual reaches from the root to a state.

    group [B] long: prompt of each trajectory. log_z [G]: learned log Z of each prompt; when None it is the mean of what
    is compared with it (no gradient), so the gradient is that of the variance of log_w over all these states.
    """
    share = stop_mask / stop_mask.sum(1, keepdim=True).clamp(min=1)  # of a state in its trajectory
    log_w = torch.where(stop_mask, log_w, 0.0)
    if log_z is None:
        log_z = _group_mean((share * log_w.detach()).sum(1), group)
    loss = (share * (log_w - log_z[group][:, None]) ** 2).sum(1).mean()
    return loss, {"log_z": log_z.detach().mean().item()}


def vargrad(log_w: Tensor, stop_mask: Tensor, group: Tensor, huber: float | None = None) -> Loss:
    """VarGrad / log-variance (Richter et al. 2020): unbiased variance of log_w[tau] among a prompt's samples, averaged
    over prompts. This is the mean over pairs of samples of (log_w[i] - log_w[j])^2 / 2, the loss that "contrastive" or
    "pairwise" trajectory balance writes without Z.

    huber (nats): beyond it a difference counts linearly (the Huber loss in place of half the square), so that no pair
    has a gradient above `huber`. q = R / Z is still the only full-support q without a gradient: the completion with the
    highest log_w, R / q, is never pulled down, and it is pulled up if any other has a lower one.

    Raises DataError for a prompt with a single sample.
    """
    final = final_log_w(log_w, stop_mask)
    size = _at_least_two(group, "vargrad")
    mean = _group_mean(final, group)
    if huber is None:
        squares = torch.zeros_like(mean).index_add(0, group, (final - mean[group]) ** 2)
        variance = squares / (size - 1).clamp(min=1)
    else:
        difference = (final[:, None] - final).masked_fill(group[:, None] != group, 0.0)
        pairs = torch.nn.functional.huber_loss(
            difference, torch.zeros_like(difference), reduction="none", delta=huber
        )
        variance = torch.zeros_like(mean).index_add(0, group, pairs.sum(1)) / (size * (size - 1)).clamp(min=1)
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
    size = _at_least_two(group, "forward_kl")
    pull = _excess(final.detach(), group)
    if drawn_from_p is not None:
        pull = torch.where(drawn_from_p[group], 1.0, pull)
    return _pulled(final, pull, group, size)


def alpha_divergence(log_w: Tensor, stop_mask: Tensor, group: Tensor, alpha: float) -> Loss:
    """The alpha-divergence of p and q by self-normalised importance weights, alpha > 0 (f-DPG, Go et al. 2023;
    Kruszewski et al. 2025, who count alpha from the other end):

        sum_k (w_k - 1/K) log_w[tau_k] / alpha,   w = softmax of alpha * the group's log_w[tau] (no gradient)

    With D = (1 - sum_z p^alpha q^(1-alpha)) / (alpha (1 - alpha)), grad D = -E_q[(p / q)^alpha grad log q] / alpha.
    Self-normalising divides this by E_q[(p / q)^alpha] and removes Z. For samples of q the gradient is then that of the
    Renyi divergence over alpha, which has the same optimum. alpha = 1 is `forward_kl`; alpha = 2 lowers the logarithm
    of the mean squared weight, on which the ESS depends; as alpha goes to 0 the gradient becomes that of KL(q || p),
    which is `vargrad`'s up to a factor. The value estimates (KL(p_a || q) + KL(q || p_a)) / alpha^2, where
    p_a ~ q^(1-alpha) p^alpha lies between q and p.

    For samples of another distribution the gradient is that of no divergence, but the optimum of an unrestricted q is
    the same: in each group the sample with the highest R / q is pulled up and the one with the lowest down, unless all
    are equal, and the pulls sum to zero.
    Raises DataError for a prompt with a single sample.
    """
    final = final_log_w(log_w, stop_mask)
    size = _at_least_two(group, "alpha")
    return _pulled(final, _excess(alpha * final.detach(), group) / alpha, group, size)


def _excess(values: Tensor, group: Tensor) -> Tensor:
    """[B] K w_k - 1 for the self-normalised weights w of exp(values) in each group of K; they sum to 0 in a group."""
    return (values - group_log_mean_exp(values, group)[group]).exp() - 1


def _pulled(final: Tensor, pull: Tensor, group: Tensor, size: Tensor) -> Loss:
    """Mean over prompts of the mean of pull * log_w. Centring removes log Z from the value if pulls do not sum to 0."""
    centred = final - _group_mean(final.detach(), group)[group]
    return (pull / size[group] * centred).sum() / (size > 0).sum(), {}


def _at_least_two(group: Tensor, name: str) -> Tensor:
    """[G] the number of samples of each prompt. Raises DataError for a single one."""
    size = torch.bincount(group)
    if (size == 1).any():
        raise DataError(f"{name} compares samples of one prompt: num_samples must be at least 2")
    return size


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
