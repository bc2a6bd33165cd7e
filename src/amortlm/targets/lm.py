"""log p(of | given) of a frozen LM at every stopping state, in as few passes as possible.

One pass over the completions gives log p of every prefix and of the stop symbol after it. When text follows
`{z}`, each stopping state needs that text scored after it: these branches are packed side by side behind the
shared keys and values of prompt and completion, under a 4-D mask, in chunks that fit the memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from amortlm.errors import TemplateError
from amortlm.passes import Prefix, encode_prompts, gather_log_probs, pad_right, state_logits
from amortlm.targets.base import Scoring, Target
from amortlm.targets.template import Messages, PromptTemplate, Template
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel


@dataclass(frozen=True)
class Context:
    """One row's fixed text around z: tokens, and which of them are scored (belong to `of`)."""

    before: list[int]
    before_scored: int  # the last so many tokens of `before` belong to `of`
    after: list[int]
    after_scored: int  # the last so many tokens of `after` belong to `of`


@dataclass(frozen=True)
class CompletionPass:
    """The pass over prompts and completions that terms with the same prompt share.

    log_tok [B, T] log p(z_k | ...), log_stop [B, S, T+1] log p(stop s | z_1:t)
    """

    prefix: Prefix
    cache: DynamicCache | None
    log_tok: Tensor
    log_stop: Tensor


class LogProb(Target):
    """log p(of | given); see `LanguageModel.log_prob`. Hu et al. 2024, section 3.1: tempered, contrastive,
    infilling and chain-of-thought posteriors are sums of such terms."""

    def __init__(self, lm: LanguageModel, of: str, given: str | Messages = ""):
        self.lm, self.of, self.given = lm, Template(of), PromptTemplate(given)
        text_given = self.given.templates[0] if self.given.roles is None else None
        self._z_in_given = text_given is not None and text_given.has_latent
        if self._z_in_given == self.of.has_latent:
            raise TemplateError(
                f"log_prob(of={of!r}, given={given!r}): the latent {{z}} must appear exactly once, in `of` or in a "
                "text `given`"
            )
        self.columns = frozenset(self.of.columns | self.given.columns)

    def __repr__(self) -> str:
        return f"log p({self.of.text!r} | {self.given.source!r})"

    def to_spec(self) -> list[dict[str, Any]]:
        return [{"log_prob": {"of": self.of.text, "given": self.given.source}}]

    def context(self, row: Row) -> Context:
        """Tokenise the text around z. Text and its continuation are tokenised apart at `given|of`."""
        lm = self.lm
        if self._z_in_given:
            before, after_given = self.given.templates[0].split(row)
            after = lm.encode_continuation(after_given)
            scored = lm.encode_continuation(self.of.split(row)[0])
            return Context(lm.encode_start(before), 0, after + scored, len(scored))
        given = lm.encode_prompt(self.given, row)
        of_before, of_after = (lm.encode_continuation(text) for text in self.of.split(row))
        return Context(given + of_before, len(of_before), of_after, len(of_after))

    def rows_per_chunk(self, rollouts: Rollouts) -> int:
        # Logits, their float32 log-softmax and the activations around them: about three copies.
        bytes_per_row = 3 * 4 * rollouts.stop_mask.shape[1] * self.lm.vocab_size
        return int(self.lm.score_memory_mb * 2**20 // bytes_per_row)

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts.to(self.lm.device)
        contexts = [self.context(row) for row in rollouts.rows]
        self._check_lengths(contexts, rollouts)
        prompts = tuple(tuple(c.before) for c in contexts)
        shared = scoring.memo(
            ("pass", id(self.lm), prompts), lambda: completion_pass(self.lm, prompts, rollouts)
        )
        log_r = torch.zeros(rollouts.stop_mask.shape, device=self.lm.device)
        if not self._z_in_given:
            log_r[:, 1:] = (shared.log_tok * rollouts.written).cumsum(1)
            log_r += self._log_before(contexts)[rollouts.row_index, None]
        if not any(c.after for c in contexts):
            return log_r + (0.0 if self._z_in_given else shared.log_stop.logsumexp(1))
        after = score_branches(self.lm, shared, contexts, rollouts)
        # Sum over stop symbols s of p(s | z) p(after | z s); with z in `given` the symbol is conditioned on.
        log_stop = shared.log_stop
        if self._z_in_given:
            log_stop = log_stop.log_softmax(1)
        return log_r + (log_stop + after).logsumexp(1)

    def _check_lengths(self, contexts: list[Context], rollouts: Rollouts) -> None:
        longest = max(len(c.before) + len(c.after) for c in contexts)
        total = longest + rollouts.tokens.shape[1] + 1
        self.lm.check_context(total, f"{self!r} with its completion")

    def _log_before(self, contexts: list[Context]) -> Tensor:
        """[N] log-probability of the part of `of` that stands before z: constant, but part of log Z."""
        out = torch.zeros(len(contexts), device=self.lm.device)
        for i, c in enumerate(contexts):
            if c.before_scored:
                ids = torch.tensor([c.before], device=self.lm.device)
                logits = self.lm.model(input_ids=ids).logits[:, -c.before_scored - 1 : -1]
                out[i] = gather_log_probs(logits, ids[:, -c.before_scored :]).sum()
        return out


def completion_pass(
    lm: LanguageModel, prompts: tuple[tuple[int, ...], ...], rollouts: Rollouts
) -> CompletionPass:
    prefix = encode_prompts(lm.model, prompts)
    logits, cache = state_logits(lm.model, prefix, rollouts.row_index, rollouts.tokens, keep_cache=True)
    norm = logits.float().logsumexp(-1)
    log_tok = logits[:, :-1].gather(-1, rollouts.tokens[..., None]).squeeze(-1).float() - norm[:, :-1]
    stops = torch.tensor(rollouts.stop_ids, device=logits.device)
    log_stop = logits[..., stops].float().movedim(-1, 1) - norm[:, None]
    return CompletionPass(prefix, cache, log_tok, log_stop)


@dataclass(frozen=True)
class Slots:
    """The branches to score, M per trajectory: which state and stop symbol each hangs on.

    state, stop [B, M] long; valid [B, M] bool (trajectories with fewer stopping states are padded)
    """

    state: Tensor
    stop: Tensor
    valid: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts) -> Slots:
        mask, n_stops = rollouts.stop_mask, len(rollouts.stop_ids)
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
        state = order.repeat_interleave(n_stops, dim=1)
        stop = torch.arange(n_stops, device=mask.device).repeat(order.shape[1]).expand_as(state)
        return cls(state, stop, mask.gather(1, state))

    def split(self, size: int) -> list[Slots]:
        parts = zip(self.state.split(size, 1), self.stop.split(size, 1), self.valid.split(size, 1), strict=True)
        return [Slots(*part) for part in parts]


def score_branches(
    lm: LanguageModel, shared: CompletionPass, contexts: list[Context], rollouts: Rollouts
) -> Tensor:
    """[B, S, T+1] log p(scored text after z | prompt z_1:t s); 0 where stopping is not allowed."""
    after, _ = pad_right([c.after for c in contexts], lm.device)
    positions = torch.arange(after.shape[1], device=lm.device)
    ends = torch.tensor([[len(c.after)] for c in contexts], device=lm.device)
    starts = ends - torch.tensor([[c.after_scored] for c in contexts], device=lm.device)
    scored = (positions >= starts) & (positions < ends)
    after, scored = after[rollouts.row_index], scored[rollouts.row_index]

    n_rows, n_states = rollouts.stop_mask.shape
    out = torch.zeros(n_rows, len(rollouts.stop_ids), n_states, device=lm.device)
    # Per branch token: logits with their float32 copies, and its row of the attention mask.
    keys = shared.prefix.mask.shape[1] + n_states
    bytes_per_slot = n_rows * after.shape[1] * (3 * 4 * lm.vocab_size + 2 * 4 * keys)
    size = max(1, int(lm.score_memory_mb * 2**20 // bytes_per_slot))
    rows = torch.arange(n_rows, device=lm.device)[:, None]
    for slots in Slots.of(rollouts).split(size):
        log_p = _score_slots(lm, shared, rollouts, slots, after, scored)
        # Padded slots hang on states that no other slot of their row names: writing 0 there is harmless.
        out[rows, slots.stop, slots.state] = log_p.masked_fill(~slots.valid, 0.0)
    return out


def _score_slots(
    lm: LanguageModel, shared: CompletionPass, rollouts: Rollouts, slots: Slots, after: Tensor, scored: Tensor
) -> Tensor:
    """[B, M] log-probability of the scored tokens of `after` behind each slot's state and stop symbol."""
    n_rows, n_slots = slots.state.shape
    width = after.shape[1]
    stops = torch.tensor(rollouts.stop_ids, device=lm.device)[slots.stop]
    # Input: stop symbol, then the text without its last token; output: the text.
    ids = torch.cat([stops[..., None], after[:, None, :-1].expand(-1, n_slots, -1)], dim=2)
    past = shared.prefix.mask[rollouts.row_index]
    first = past.sum(1, keepdim=True) + 1 + slots.state
    positions = first[..., None] + torch.arange(width, device=lm.device)
    cache = shared.cache
    assert cache is not None, "the completion pass keeps its cache"
    out = lm.model(
        input_ids=ids.flatten(1),
        attention_mask=_branch_mask(past, rollouts.stop_mask.shape[1], slots.state, width, lm.model.dtype),
        position_ids=positions.flatten(1),
        past_key_values=cache,
        use_cache=True,
    )
    cache.crop(-n_slots * width)
    targets = after[:, None].expand(-1, n_slots, -1)
    log_p = gather_log_probs(out.logits.view(n_rows, n_slots, width, -1), targets)
    return (log_p * scored[:, None]).sum(-1)


def _branch_mask(past: Tensor, n_states: int, state: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Additive 4-D mask [B, 1, M*L, P-1 + T+1 + M*L]: prompt, z_1:t, then the branch itself, causally."""
    n_rows, n_slots = state.shape
    length = n_slots * width
    seen = torch.arange(n_states, device=state.device) <= state[..., None]  # [B, M, T+1]
    seen = seen.repeat_interleave(width, dim=1)
    token = torch.arange(length, device=state.device)
    same = token[:, None] // width == token // width
    own = same & (token[:, None] >= token)
    allowed = torch.cat(
        [past[:, None].expand(-1, length, -1), seen, own.expand(n_rows, -1, -1)], dim=2
    )
    mask = torch.zeros(allowed.shape, dtype=dtype, device=state.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
