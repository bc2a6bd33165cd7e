"""Targets and policies as potentials of `genlm-control`, and its potentials as targets.

A potential gives a token string two log weights: `complete`, if the string ends there, and `prefix`, if it continues.
Here `complete` is exactly log R, log q or log R - log q. Any positive prefix weight is correct, since a sampler divides
it out again; only the variance depends on it (see `inference.smc`).

    proposal(policy, row)           q on the policy's support, EOS = "one of the stop symbols"
    critic(target, policy, row)     R / q: the weight of draws of q; the prefix weight is the weight of stopping now
    to_potential(target, ...)       R itself: to multiply with other potentials, or to sample from directly
    from_potential(potential)       a target term with log R(z_1:t) = complete(z_1:t)

Vocabulary: all tokens of the model except the stop symbols, as genlm's `Token` (equal by id), so that products with its
`PromptedLLM` of the same tokenizer are possible. Strings outside the support have weight zero.
"""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from amortlm.engine.prefix import pad_right
from amortlm.errors import ConfigError, MissingExtraError
from amortlm.policy.policy import Policy
from amortlm.support import Support, SupportLaw
from amortlm.targets.base import LinearCombination, Scoring, Softened, Target
from amortlm.targets.constraints import Length
from amortlm.targets.texts import TextTerm
from amortlm.types import Rollouts, Row

try:
    from genlm.backend.tokenization import Token, decode_vocab
    from genlm.control import Potential
    from genlm.control.typing import Atomic
except ImportError as e:
    raise MissingExtraError("amortlm.interop.genlm needs genlm-control: pip install 'amortlm[genlm]'") from e

if TYPE_CHECKING:
    from amortlm.engine.model import CausalLM
    from amortlm.text.codec import Codec

T = TypeVar("T")
Context = Sequence[Token]


def to_potential(target: Target, support: Support, row: Row, lm: CausalLM) -> Potential:
    """The target of one row as a potential: complete(z) = log R(z) in nats, -inf outside the support.

    prefix(z) is log R of stopping at z, without terms with R = 0 there (z can still become valid) and without terms
    that judge only finished text; 0 if stopping is not allowed or no term is left. It does not use q: to correct draws
    of a policy, `critic` has better prefix weights. Raises ConfigError for a support with a tool.
    """
    return TargetPotential(lm, support.bind(lm), row, target)


def proposal(policy: Policy, row: Row) -> Potential:
    """q of one row as a potential: `logw_next` is log q of each token, and of stopping (EOS). It sums to one.

    Give it to genlm's samplers: `direct_token_sampler(proposal(policy, row))`. It always uses the current weights of
    the policy. Raises ConfigError for a support with a tool.
    """
    return PolicyPotential(policy, row)


def critic(target: Target, policy: Policy, row: Row) -> Potential:
    """R / q of one row as a potential: `SMC(direct_token_sampler(proposal(policy, row)), critic(...))` samples R.

    complete(z) = log w(z) = log R(z) - log q(z), nats. prefix(z) is the log weight of stopping at z (half of the twist
    of `inference.smc`), with the terms of the target that `to_potential` keeps at a prefix; 0 if there are none. So for
    a target that judges only finished text, run SMC with `ess_threshold=0`. Raises ConfigError for a support with a
    tool.
    """
    return CriticPotential(policy, row, target)


def from_potential(potential: Potential) -> Target:
    """A target term: the potential's log weight of z_1:t as a complete string, at every stopping state.

    Potentials over `Token`s or token bytes read the tokens; potentials over bytes (regular expressions, grammars, JSON
    schemas) read the bytes of the text. A string with an unknown token or byte has R = 0. The potential is the same for
    every row, and cannot be saved. Raises ConfigError for other vocabularies, which have to be coerced first.
    """
    return PotentialTarget(potential)


def vocabulary(lm: Codec) -> list[Token]:
    """Every token of the model's tokenizer, by id."""
    try:
        return decode_vocab(lm.tokenizer, byte2str_fallback="latin1")[0]
    except (
        ValueError
    ):  # genlm cannot determine the bytes of this tokenizer's tokens: use the bytes of their texts
        return [Token(i, lm.decode([i]).encode()) for i in range(len(lm.tokenizer))]


class CompletionPotential(Potential):
    """A weight of the completions of one row in a support; a subclass defines how rollouts are scored."""

    def __init__(self, lm: CausalLM, support: SupportLaw, row: Row):
        if support.tool is not None:
            raise ConfigError(
                "a potential cannot have tokens that a tool writes: use a support without a tool"
            )
        super().__init__([t for t in vocabulary(lm) if t.token_id not in support.stop_ids])
        self.lm, self.support, self.row = lm, support, row
        written = support.allowed.nonzero().squeeze(1).tolist()
        self._written = set(written) if support.lists is None else {*written, support.lists.separator}
        self._columns = [i for i, t in enumerate(self.vocab) if t.token_id in self._written]

    @abstractmethod
    def score_complete(self, rollouts: Rollouts) -> Tensor:
        """[B] log weight of finished completions in the support, nats."""

    @abstractmethod
    def score_prefix(self, rollouts: Rollouts, stops: Tensor) -> Tensor:
        """[B] log weight of prefixes of allowed tokens, nats. stops [B] bool: may the completion stop there?"""

    def rollouts(self, ids: Sequence[Sequence[int]]) -> Rollouts:
        tokens, lengths = pad_right(ids, self.lm.device)
        return self.support.rollouts([self.row], torch.zeros_like(lengths), tokens, lengths)

    def has_prefix(self, ids: Sequence[int]) -> bool:
        """Is this a prefix of a completion in the support?"""
        if len(ids) > self.support.max_tokens or not self._written.issuperset(ids):
            return False
        return self.support.automaton is None or self.support.automaton.has_prefix(ids)

    def _scores(
        self,
        contexts: Sequence[Context],
        inside: Callable[[list[int]], bool],
        score: Callable[[Rollouts], Tensor],
    ) -> np.ndarray:
        """[N] scores of the contexts for which `inside` is True, in one batch; -inf for the others."""
        if not contexts:
            raise ValueError("no contexts to score")
        ids = [[t.token_id for t in context] for context in contexts]
        out = np.full(len(ids), -math.inf)
        where = [i for i, z in enumerate(ids) if inside(z)]
        if where:
            out[where] = score(self.rollouts([ids[i] for i in where])).double().cpu().numpy()
        return out

    async def batch_complete(self, contexts: Sequence[Context]) -> np.ndarray:
        return self._scores(contexts, self.support.contains, self.score_complete)

    async def batch_prefix(self, contexts: Sequence[Context]) -> np.ndarray:
        def score(rollouts: Rollouts) -> Tensor:
            stops = rollouts.stop_mask.gather(1, rollouts.lengths[:, None]).squeeze(1)
            return self.score_prefix(rollouts, stops)

        return self._scores(contexts, self.has_prefix, score)

    async def complete(self, context: Context) -> float:
        return float((await self.batch_complete([context]))[0])

    async def prefix(self, context: Context) -> float:
        return float((await self.batch_prefix([context]))[0])

    async def logw_eos(self, context: Context) -> float:
        return await self.complete(context) - await self.prefix(context)

    async def batch_logw_next(self, contexts: Sequence[Context]) -> Any:
        """Log weights of every next token: one batch of (contexts x allowed tokens) prefixes."""
        before = await self._nonzero_prefix(contexts)
        weights = self.alloc_rows(len(contexts))
        longer = [[*context, self.vocab[i]] for context in contexts for i in self._columns]
        if longer:
            weights[:, self._columns] = (await self.batch_prefix(longer)).reshape(len(contexts), -1)
        weights[:, -1] = await self.batch_complete(contexts)
        return self.make_lazy_weights(weights - before[:, None])

    async def logw_next(self, context: Context) -> Any:
        return self.make_lazy_weights((await self.batch_logw_next([context])).weights[0])

    async def _nonzero_prefix(self, contexts: Sequence[Context]) -> np.ndarray:
        before = await self.batch_prefix(contexts)
        for context, log_w in zip(contexts, before, strict=True):
            if log_w == -math.inf:
                raise ValueError(f"{context!r} has weight zero as a prefix: nothing can follow it")
        return before


class TargetPotential(CompletionPotential):
    """R (`to_potential`)."""

    def __init__(self, lm: CausalLM, support: SupportLaw, row: Row, target: Target):
        super().__init__(lm, support, row)
        self.target = target.bind(lm)
        self.twist = prefix_terms(self.target)

    def score_complete(self, rollouts: Rollouts) -> Tensor:
        return self.target.score_final(rollouts)

    def score_prefix(self, rollouts: Rollouts, stops: Tensor) -> Tensor:
        if self.twist is None:
            return torch.zeros(len(rollouts))
        return self.twist.score_final(rollouts)  # 0 where stopping is not allowed

    def __repr__(self) -> str:
        return f"to_potential({self.target!r})"


class PolicyPotential(CompletionPotential):
    """q (`proposal`)."""

    def __init__(self, policy: Policy, row: Row):
        super().__init__(policy.lm, policy.support, row)
        self.policy = policy

    @torch.no_grad()
    def score_complete(self, rollouts: Rollouts) -> Tensor:
        return self.policy.evaluate(rollouts).final(rollouts.lengths.to(self.policy.device))

    @torch.no_grad()
    def score_prefix(self, rollouts: Rollouts, stops: Tensor) -> Tensor:
        return self.policy.evaluate(rollouts).log_pf.sum(1)

    async def batch_logw_next(self, contexts: Sequence[Context]) -> Any:
        """log q of every next token and of stopping: one pass of the policy."""
        ids = [[t.token_id for t in context] for context in contexts]
        if not all(map(self.has_prefix, ids)):
            await self._nonzero_prefix(contexts)
        return self.make_lazy_weights(self._log_q_next(self.rollouts(ids).to(self.policy.device)))

    @torch.no_grad()  # not on the coroutine above, whose body runs after the decorator has returned
    def _log_q_next(self, rollouts: Rollouts) -> np.ndarray:
        """[B, V+1] log q of the next token after each completion, EOS last."""
        passes = self.policy.passes
        prefix = passes.encode(self.policy.encode_rows(rollouts.rows))
        ids = [t.token_id for t in self.vocab]
        out = torch.empty(len(rollouts), len(ids) + 1, dtype=torch.float64)
        for group in passes.groups(prefix, rollouts.lengths):
            t, tokens = rollouts.lengths[group], rollouts.tokens[group, : int(rollouts.lengths[group].max())]
            batch = torch.arange(len(group), device=group.device)
            logits = passes.state_logits(prefix, rollouts.row_index[group], tokens)[batch, t]
            step = self.support.step(logits, t, self.support.nodes(tokens)[batch, t])
            found = torch.cat([step.log_q[:, ids], step.log_stop[:, None]], dim=1)
            out[group.cpu()] = found.double().cpu()
        return out.numpy()

    def __repr__(self) -> str:
        return "proposal(q)"


class CriticPotential(CompletionPotential):
    """R / q (`critic`)."""

    def __init__(self, policy: Policy, row: Row, target: Target):
        super().__init__(policy.lm, policy.support, row)
        self.policy, self.target = policy, target.bind(policy.lm)
        self.twist = prefix_terms(self.target)

    @torch.no_grad()
    def score_complete(self, rollouts: Rollouts) -> Tensor:
        return self._log_w(self.target, rollouts)

    @torch.no_grad()
    def score_prefix(self, rollouts: Rollouts, stops: Tensor) -> Tensor:
        log_w = torch.zeros(len(rollouts), device=stops.device)
        where = stops.nonzero().squeeze(1)
        if self.twist is not None and len(where) > 0:
            log_w[where] = self._log_w(self.twist, rollouts.select(where)).to(log_w.device)
        return log_w

    def _log_w(self, target: Target, rollouts: Rollouts) -> Tensor:
        log_q = self.policy.evaluate(rollouts).final(rollouts.lengths.to(self.policy.device))
        return target.score_final(rollouts).to(log_q.device) - log_q

    def __repr__(self) -> str:
        return f"critic({self.target!r})"


def prefix_terms(target: Target) -> Target | None:
    """The terms of a target that score prefixes, each left out where its R is 0; None if there is no such term.

    A prefix with R = 0 can still become valid, so a prefix weight of zero would be wrong.
    """
    terms = [(weight, term) for weight, term in target.terms if term.every_prefix]
    # With penalty 0 and a prior of 0 nats, terms with R = 0 are left out.
    return Softened(LinearCombination(terms), prior=Length(), penalty=0.0) if terms else None


class PotentialTarget(TextTerm):
    """log R(z_1:t) = complete(z_1:t) of a potential (`from_potential`)."""

    def __init__(self, potential: Potential):
        kind, small = potential.token_type, all(isinstance(v, int) and 0 <= v < 256 for v in potential.vocab)
        if kind not in (Atomic(Token), Atomic(bytes)) and not (kind == Atomic(int) and small):
            raise ConfigError(
                f"from_potential reads potentials over Tokens, token bytes or bytes, not {kind}; coerce {potential!r} "
                "to one of these vocabularies"
            )
        self.potential = potential
        self._tokens: list[Token] = []

    def bind(self, lm: Codec) -> Target:
        bound: Any = super().bind(lm)
        bound._tokens = vocabulary(lm)
        return bound

    def score_batch(self, scoring: Scoring) -> Tensor:
        mask, tokens = scoring.rollouts.stop_mask, scoring.rollouts.tokens.tolist()
        strings = [tuple(tokens[b][:t]) for b, t in mask.nonzero().tolist()]
        asked = {z: self._context(z) for z in strings}
        known = {z: c for z, c in asked.items() if all(x in self.potential.lookup for x in c)}
        log_r = dict.fromkeys(asked, -math.inf)
        if known:
            values = run(self.potential.batch_complete(list(known.values())))
            log_r |= {z: float(v) for z, v in zip(known, values, strict=True)}
        out = torch.zeros(mask.shape, device=mask.device)
        out[mask] = torch.tensor([log_r[z] for z in strings], device=mask.device)
        return out

    def _context(self, ids: Sequence[int]) -> list[Any]:
        """The completion in the potential's vocabulary."""
        assert self.bound_lm is not None  # raises ConfigError if the target is not bound
        tokens = [self._tokens[i] for i in ids]
        if self.potential.token_type == Atomic(int):
            return list(b"".join(tokens))
        return tokens if self.potential.token_type == Atomic(Token) else [bytes(t) for t in tokens]

    def to_spec(self) -> list[dict[str, Any]]:
        raise ConfigError(
            f"{self!r} cannot be saved by name; build the potential in a function at the top level of an importable "
            "module, and use verifier('package.module:function', every_prefix=True)"
        )

    def __repr__(self) -> str:
        return f"from_potential({self.potential!r})"


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine. If this thread has a running event loop (a notebook, a genlm sampler), the coroutine
    runs in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
