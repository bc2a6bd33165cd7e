"""Block-wise Metropolis-Hastings: completions are lengthened block by block, with some steps after each block.

Karan and Du 2025, "Reasoning with sampling" (arXiv 2510.14901, Algorithm 1), there for p(z|x)^a with the model at
temperature 1 / a as proposal; here for any policy and any target. After a block the texts have at most n tokens, and a
text of n tokens that has not stopped is unfinished. A step redraws a text from a token on that is chosen uniformly
among its D tokens (a drawn stop counts as one), up to n tokens. It is accepted with

    min(1, v(z') D / (v(z) D')),    v(z) = R(z) / q(z) for a finished z,

    v(z_1:n) = R(z_1:n-1) / (q(z_1:n-1) q(stop | z_1:n-1)) for an unfinished one:

the weight of stopping before its last token. So the steps of a block leave q v unchanged, q(z_1:n) being the
probability of the tokens alone. For R = p^a, one stop symbol, and q that is p at temperature 1 / a
(`amortlm.tempered`), every q v is p^a of the text, finished or not. With texts of one length this is the algorithm as
published. For texts that stop, D / D' is added to the ratio, and a text that has stopped is redrawn in later blocks; in
the authors' code it is final. Without these two the posterior is not stationary.

Nothing is unfinished after the last block, of max_tokens. Its steps leave the posterior R / Z on the policy's support
unchanged, whatever was done before: the earlier blocks only choose where these chains start.

If the weight of stopping is not known for one of two texts (before min_tokens, where the support does not allow a stop,
where R = 0 at a prefix that can still become valid, or with a target that judges finished text only), the step is
accepted as if both had the same v.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from amortlm.engine.decoding import Draws
from amortlm.engine.prefix import Prefix
from amortlm.errors import ConfigError
from amortlm.inference.mcmc import Chains
from amortlm.inference.paths import prepare, redraw, rollouts_of, uniforms
from amortlm.policy.policy import Policy
from amortlm.seeds import seed_of
from amortlm.targets.base import Target
from amortlm.types import Row, row_key


def blockwise_metropolis_hastings(
    policy: Policy,
    target: Target,
    row: Row,
    *,
    num_chains: int,
    block_tokens: int,
    num_steps: int,
    seed: object,
) -> Chains:
    """`num_chains` chains as one batch, each of `num_steps` steps after every `block_tokens` tokens. Exact for
    num_steps -> infinity.

    The result has accepted [C, S] and trace [C, S+1] for the S = num_steps steps of the last block, and counts the
    tokens and completions of all blocks. An unfinished text that is judged counts as a completion. Raises ConfigError
    for num_chains < 1, block_tokens < 1, num_steps < 0 and a support with a tool; other errors as `paths.prepare`.
    """
    if num_chains < 1 or block_tokens < 1 or num_steps < 0:
        raise ConfigError(
            f"num_chains={num_chains}, block_tokens={block_tokens}, num_steps={num_steps}: need at least one chain, "
            "blocks of at least one token, and at least 0 steps"
        )
    target, prefix = prepare(policy, target, row)
    generator = torch.Generator().manual_seed(seed_of(("blocks", seed, row_key(row))))
    walk = _Walk(policy, target, row, prefix, generator)
    walk.begin(num_chains)
    for end in [*range(block_tokens, policy.support.max_tokens, block_tokens), policy.support.max_tokens]:
        walk.lengthen(end)
        for _ in range(num_steps):
            walk.step()
    log_q = walk.texts.log_q
    return Chains(
        rollouts=rollouts_of(walk.texts, policy, row),
        log_reward=walk.trace[-1],
        log_q=log_q,
        accepted=torch.stack(walk.accepted, 1) if num_steps else torch.zeros(num_chains, 0, dtype=torch.bool),
        trace=torch.stack(walk.trace, 1),
        tokens_decoded=walk.decoded,
        completions_scored=walk.scored,
    )


class _Walk:
    """The texts of C chains, at most `end` tokens long, and their log v."""

    texts: Draws
    log_v: Tensor

    def __init__(self, policy: Policy, target: Target, row: Row, prefix: Prefix, generator: torch.Generator):
        self.policy, self.target, self.row, self.prefix = policy, target, row, prefix
        self.generator = generator
        self.end = self.decoded = self.scored = 0

    def begin(self, count: int) -> None:
        empty = Draws.blank(count, self.policy.support, self.policy.device)
        self.texts = replace(empty, lengths=torch.zeros_like(empty.lengths))

    def lengthen(self, end: int) -> None:
        """Write the unfinished texts on, to at most `end` tokens."""
        going = (self.texts.lengths == self.end).nonzero().squeeze(1)
        before, self.end = self.end, end
        if len(going):
            longer = self._redraw(self.texts.select(going), torch.full_like(going, before))
            self.texts = self.texts.put(going, longer)
        self.log_v = self._log_v(self.texts)
        self.trace = [self.log_v + self.texts.log_q]
        self.accepted: list[Tensor] = []

    def step(self) -> None:
        u = uniforms(self.generator, (len(self.texts),), self.policy)
        proposed = self._redraw(self.texts, (u * self._choices(self.texts)).long())
        log_v = self._log_v(proposed)
        ratio = log_ratio(self.log_v, log_v) + cut_log_ratio(
            self._choices(self.texts), self._choices(proposed)
        )
        accept = uniforms(self.generator, (len(u),), self.policy).log() < ratio
        self.texts, self.log_v = self.texts.where(accept, proposed), torch.where(accept, log_v, self.log_v)
        self.trace.append(self.log_v + self.texts.log_q)
        self.accepted.append(accept)

    def _choices(self, texts: Draws) -> Tensor:
        """[B] D: the tokens that were drawn, and the stop of a finished text if it was not certain."""
        return (texts.lengths + 1).clamp(max=self.end)

    def _redraw(self, texts: Draws, keep: Tensor) -> Draws:
        until = self.end if self.end < self.policy.support.max_tokens else None
        found = redraw(self.policy, self.prefix, texts, keep, self.generator, until)
        self.decoded += int((self._choices(found) - keep).sum())
        return found

    def _log_v(self, texts: Draws) -> Tensor:
        """[B] log v, nats; -inf for a finished text with R = 0, NaN where it is not known."""
        unfinished = texts.lengths == self.end
        if self.end == self.policy.support.max_tokens:
            unfinished = torch.zeros_like(unfinished)
        state = texts.lengths - unfinished.long()
        log_v = torch.full(state.shape, torch.nan, dtype=torch.float64, device=state.device)
        # A target that judges finished text only is not asked about other text.
        asked = (
            torch.arange(len(texts), device=state.device)
            if self.target.every_prefix
            else (~unfinished).nonzero()[:, 0]
        )
        if len(asked) == 0:
            return log_v
        log_v[asked] = stopping_weights(self.policy, self.target, self.row, texts.select(asked), state[asked])
        self.scored += len(asked)
        return log_v.masked_fill(unfinished & log_v.isneginf(), torch.nan)


def stopping_weights(policy: Policy, target: Target, row: Row, texts: Draws, state: Tensor) -> Tensor:
    """[B] log weights of stopping after `state` [B] tokens, float64, nats; NaN where the support does not allow it."""
    stopped = rollouts_of(replace(texts.cut(state), lengths=state), policy, row)
    may = stopped.stop_mask.gather(1, state[:, None]).squeeze(1)
    log_r = target.score_final(stopped).double().to(policy.device)
    written = torch.arange(texts.tokens.shape[1], device=state.device) < state[:, None]
    log_q = texts.log_pf.double().masked_fill(~written, 0.0).sum(1)
    log_q = log_q + texts.log_pterm.double().gather(1, state[:, None]).squeeze(1)
    return (log_r - log_q).masked_fill(~may, torch.nan)


def cut_log_ratio(choices: Tensor, choices_new: Tensor) -> Tensor:
    """[B] log D / D'."""
    return choices.double().log() - choices_new.double().log()


def log_ratio(log_v: Tensor, log_v_new: Tensor) -> Tensor:
    """[B] log v(z') / v(z): 0 if one of them is unknown (NaN), never towards v = 0, and always away from it."""
    found = (log_v_new - log_v).nan_to_num(0.0)
    found = found.masked_fill(log_v_new.isneginf(), -torch.inf)
    return found.masked_fill(log_v.isneginf(), torch.inf)
