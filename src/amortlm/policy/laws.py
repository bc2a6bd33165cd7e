"""Laws that every policy obeys, as assertions to run on your own model and support: see `check_policy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amortlm.engine.exactness import Check, Finding
from amortlm.engine.model import CausalLM
from amortlm.policy.policy import Policy
from amortlm.support import Support
from amortlm.types import PolicyLogProbs, Rollouts, Row

MAX_SUPPORT = 20_000


def check_policy(
    policy: Policy, rows: Sequence[Row], atol: float = 1e-4, num_samples: int = 8, seed: object = 0
) -> None:
    """Assert that `policy` is one distribution per row, the same in `sample` and in `evaluate`.

    1. Sum: over a support of at most `MAX_SUPPORT` completions, q(z) sums to one for each row (within `atol`).
    2. Agreement: the log-probabilities that `sample` returns are those of `evaluate` (within `atol` nats).
    3. Batches: a row alone gets the completions and log q that it gets among the others.

    AssertionError names row and completion.
    """
    if policy.support.size() <= MAX_SUPPORT:
        check_sum(policy, rows, atol)
    rollouts, sampled = policy.sample(rows, num_samples, seed=seed)
    with torch.no_grad():
        evaluated = policy.evaluate(rollouts)
    _assert_same(rollouts, "evaluate() and sample() differ", evaluated, sampled, atol)
    for n, row in enumerate(rows):
        mine = (rollouts.row_index == n).nonzero().squeeze(1)
        part = rollouts.select(mine)
        alone, _ = policy.sample([row], num_samples, seed=seed)
        if alone.completions() != part.completions():
            raise AssertionError(
                f"row {n}: sample() draws other completions when the row is alone in the batch"
            )
        with torch.no_grad():
            log_probs = policy.evaluate(alone)
        width = part.tokens.shape[1]
        batch = PolicyLogProbs(evaluated.log_pf[mine, :width], evaluated.log_pterm[mine, : width + 1])
        _assert_same(part, f"row {n}: alone and in a batch evaluate() differs", batch, log_probs, atol)


def check_sum(policy: Policy, rows: Sequence[Row], atol: float = 1e-4) -> None:
    """Assert that q sums to one for each row, by enumeration of the whole support."""
    completions = support_completions(policy)
    for n, row in enumerate(rows):
        rollouts = policy.rollouts([row], [completions])
        with torch.no_grad():
            log_q = policy.evaluate(rollouts).final(rollouts.lengths)
        total = log_q.double().exp().sum().item()
        if not abs(total - 1) <= atol:
            raise AssertionError(
                f"row {n}: q sums to {total:.6f} over the {len(completions)} completions, not to 1"
            )


def support_completions(policy: Policy) -> list[list[int]]:
    """Every completion of the policy's support, as token lists."""
    support = policy.support
    lengths = range(support.min_tokens, support.max_tokens + 1)
    return [z for length in lengths for z in support.completions(length)]


def _assert_same(
    rollouts: Rollouts, law: str, expected: PolicyLogProbs, got: PolicyLogProbs, atol: float
) -> None:
    where: tuple[tuple[str, Tensor, Tensor, Tensor], ...] = (
        ("token", rollouts.action_mask, expected.log_pf, got.log_pf),
        ("stop at state", rollouts.stop_mask, expected.log_pterm, got.log_pterm),
    )
    for what, mask, a, b in where:
        near = (a == b) | ((a - b).abs() <= atol)
        for i, t in (mask & ~near).nonzero().tolist():
            raise AssertionError(
                f"{law}: trajectory {i} {rollouts.completions()[i]}, log q of {what} {t} is {a[i, t].item():.6g} and "
                f"{b[i, t].item():.6g} (allowed: {atol:g} nats)"
            )


@torch.no_grad()
def examine_policy(lm: CausalLM) -> tuple[Finding, ...]:
    """What making a policy with the default adapter does to p, and whether q computes in training as in evaluation.

    Raises ModelError, and what peft raises for a model that it cannot adapt.
    """
    check = Check(lm.model, lm.name)
    before = check.alone(check.texts[0])
    policy = Policy(lm, "", Support(stop=check.texts[0][0], max_tokens=4))
    pairs = {
        "p after a policy is made": (check.alone(check.texts[0]), before),
        "q in training mode, untrained": (
            Check(policy.train().model, lm.name).alone(check.texts[0]),
            before,
        ),
    }
    errors = {what: (a - b).abs().nan_to_num().max().item() for what, (a, b) in pairs.items()}
    return tuple(Finding(what, error, error <= check.tolerance) for what, error in errors.items())
