"""Drawing completions, and redrawing their rest after any prefix: used by Metropolis-Hastings and SMC."""

from __future__ import annotations

import torch
from torch import Tensor

from amortlm.data import check_rows
from amortlm.engine.decoding import Draws, decode
from amortlm.engine.prefix import Prefix
from amortlm.errors import ConfigError, DataError
from amortlm.policy.policy import Policy
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.types import Rollouts, Row


def rollouts_of(draws: Draws, policy: Policy, row: Row) -> Rollouts:
    """Draws for one row as its rollouts, trimmed to the longest."""
    draws = draws.trimmed()
    zero = torch.zeros_like(draws.lengths)
    return policy.support.rollouts([row], zero, draws.tokens, draws.lengths, draws.stops)


def prepare(policy: Policy, target: Target, row: Row) -> tuple[Target, Prefix]:
    """The target bound to the policy's tokenizer, and the encoded prompt of `row`.

    Raises ConfigError for a support with a tool, SupportError if the target's latents do not fit the support, DataError
    for a missing column, PromptTooLongError for a prompt that does not fit the model.
    """
    refuse_tool(policy)
    check_rows([row], set(policy.prompt.columns) | set(target.columns), "the row")
    target = target.bind(policy.lm)
    check_statements(target, policy.support)
    with torch.no_grad():
        prefix = policy.passes.encode(policy.encode_rows([row]))
    return target, prefix


def refuse_tool(policy: Policy) -> None:
    if policy.support.tool is not None:
        raise ConfigError(
            "Metropolis-Hastings and sequential Monte Carlo cannot cut a completion that a tool writes into; "
            'use a support without a tool, or correct="sir", or --correct sir'
        )


def sample_paths(policy: Policy, prefix: Prefix, n: int, generator: torch.Generator) -> tuple[Draws, int]:
    """n draws of the policy, and the number of tokens and stops drawn."""
    draws = redraw(policy, prefix, None, torch.zeros(n, dtype=torch.long, device=policy.device), generator)
    return draws, int((draws.lengths + 1).sum())


@torch.no_grad()
def paths_of(policy: Policy, row: Row, rollouts: Rollouts, n: int) -> Draws:
    """n given completions as `Draws`. Raises DataError for another number, or for one outside the support."""
    if len(rollouts) != n:
        raise DataError(f"initial has {len(rollouts)} completions for {n} chains; give one per chain")
    completions = [[*z, s] for z, s in zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)]
    parsed = policy.rollouts([row], [completions])
    log_probs = policy.evaluate(parsed)
    missing = policy.support.max_tokens - parsed.tokens.shape[1]
    pad = torch.nn.functional.pad
    return Draws(
        tokens=pad(parsed.tokens, (0, missing)),
        lengths=parsed.lengths,
        stops=parsed.stops,
        log_pf=pad(log_probs.log_pf, (0, missing)),
        log_pterm=pad(log_probs.log_pterm, (0, missing), value=-torch.inf),
    )


def uniforms(generator: torch.Generator, shape: tuple[int, ...], policy: Policy) -> Tensor:
    """Uniforms in [0, 1), float64, drawn on the CPU: the same on every device."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(policy.device)


def redraw(
    policy: Policy,
    prefix: Prefix,
    draws: Draws | None,
    keep: Tensor,
    generator: torch.Generator,
    until: int | None = None,
) -> Draws:
    """Draw the rest of each completion from q(. | z_1:keep). keep [B] tokens stay, with their log q.

    prefix: the one encoded prompt. until: a number of tokens at which completions are left unfinished
    (`engine.decoding.decode`).
    """
    u = uniforms(generator, (len(keep), policy.support.max_tokens + 1), policy)
    index = torch.zeros_like(keep)
    return decode(policy.passes, policy.support, prefix, index, u, kept=draws, keep=keep, until=until)
