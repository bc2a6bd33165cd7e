"""log p(of | given) of a frozen LM at every stopping state, in as few passes as possible.

One pass over the completions gives log p of every prefix and of the stop symbol after it. If text follows `{z}`, this
text has to be scored after each stopping state. Each such continuation is a branch; branches are packed side by side
after the shared keys and values of prompt and completion, under a 4-D mask, in chunks that fit the memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from amortlm.engine.exactness import branch_mask
from amortlm.engine.packs import length_groups
from amortlm.engine.passes import gather_log_probs, log_norms
from amortlm.engine.prefix import Prefix, cache_bytes, pad_right, select_cache
from amortlm.errors import TemplateError
from amortlm.targets.base import Scoring, Target
from amortlm.text.template import Messages, PromptTemplate, Template
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.engine.model import CausalLM

MAX_WIDTH = 64  # branch tokens per trajectory in one pass
Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Context:
    """The fixed tokens of one row before and after z, and how many of them are scored (belong to `of`)."""

    before: list[int]
    before_scored: int  # how many of its last tokens belong to `of`
    after: list[int]
    after_scored: int  # how many of its last tokens belong to `of`


@dataclass(frozen=True)
class CompletionPass:
    """The pass over prompts and completions that terms with the same prompt share.

    log_tok [B, T] log p(z_k | ...), log_stop [B, S, T+1] log p(stop s | z_1:t)
    """

    prefix: Prefix
    cache: Cache | None
    log_tok: Tensor
    log_stop: Tensor


class LogProb(Target):
    """log p(of | given); see `amortlm.LanguageModel.log_prob`. Hu et al. 2024, section 3.1: tempered, contrastive,
    infilling and chain-of-thought posteriors are sums of such terms.

    If a tool writes into z, p is the model with the same tool: the tool's tokens have probability 1.

    Raises TemplateError unless `{z}` appears exactly once, in `of` or in a text `given`.
    """

    lm: CausalLM

    def __init__(self, lm: CausalLM, of: str, given: str | Messages = ""):
        self.lm, self.of, self.given = lm, Template(of), PromptTemplate(given)
        text_given = self.given.templates[0] if self.given.roles is None else None
        self._z_in_given = text_given is not None and text_given.has_latent
        if self._z_in_given == self.of.has_latent:
            raise TemplateError(
                f"log_prob(of={of!r}, given={given!r}): the latent {{z}} must appear exactly once, in `of` or in a "
                "text `given`"
            )
        if self.of.numbers or (text_given is not None and text_given.numbers):
            raise TemplateError(f"{self!r} mentions single statements: write it as lm.log_prob(of, given)")
        # p(y | z) is a likelihood: its sum over z need not be finite.
        self.normalised = not self._z_in_given
        self.has_suffix = self._z_in_given or bool(self.of.around[1].strip())
        self.columns = frozenset(self.of.columns | self.given.columns)

    def __repr__(self) -> str:
        return f"log p({self.of.text!r} | {self.given.source!r})"

    def to_spec(self) -> list[dict[str, Any]]:
        return [{"log_prob": {"of": self.of.text, "given": self.given.source}}]

    def context(self, row: Row) -> Context:
        """Tokenise the text around z. `given` and `of` are tokenised separately."""
        lm = self.lm
        if self._z_in_given:
            before, after_given = self.given.templates[0].split(row)
            after = lm.encode_continuation(after_given)
            scored = lm.encode_continuation(self.of.split(row)[0])
            return Context(lm.encode_start(before), 0, after + scored, len(scored))
        given = lm.encode_prompt(self.given, row)
        of_before, of_after = (lm.encode_continuation(text) for text in self.of.split(row))
        return Context(given + of_before, len(of_before), of_after, len(of_after))

    def contexts(self, scoring: Scoring) -> list[Context]:
        """`context` of each row, tokenised once for all chunks."""
        known = scoring.lasting.setdefault(
            ("contexts", id(self)), {}
        )  # by the row itself, which must not be copied
        for row in scoring.rollouts.rows:
            if id(row) not in known:
                known[id(row)] = (row, self.context(row))
        return [known[id(row)][1] for row in scoring.rollouts.rows]

    def memory_share(self, scoring: Scoring) -> float:
        rollouts, passes, contexts = scoring.rollouts, self.lm.passes, self.contexts(scoring)
        prompt, states = max(len(c.before) for c in contexts), rollouts.stop_mask.shape[1]
        prompts = len(contexts) / len(rollouts)  # of a trajectory
        cached = prompts * prompt * passes.sizes.cache
        each = cached + passes.scored_bytes(prompt, states)
        if any(c.after for c in contexts):  # half is for the branches
            each = max(each, 2 * (cached + (prompt + states) * passes.sizes.cache))
        each = max(each, prompts * passes.encoded_bytes(prompt))
        return passes.share(each, held=prompt * passes.sizes.cache)

    def score_batch(self, scoring: Scoring) -> Tensor:
        rollouts = scoring.rollouts.to(self.lm.device)
        contexts = self.contexts(scoring)
        self._check_lengths(contexts, rollouts)
        prompts = tuple(tuple(c.before) for c in contexts)
        shared = scoring.memo(
            ("pass", id(self.lm), prompts),
            lambda: completion_pass(self.lm, self._prefix(scoring, prompts), rollouts),
        )
        log_r = torch.zeros(rollouts.stop_mask.shape, device=self.lm.device)
        if not self._z_in_given:
            log_r[:, 1:] = torch.where(rollouts.action_mask, shared.log_tok, 0.0).cumsum(1)
            log_r += self._log_before(scoring, contexts)[rollouts.row_index, None]
        if not any(c.after for c in contexts):
            return log_r + (0.0 if self._z_in_given else shared.log_stop.logsumexp(1))
        after = score_branches(self.lm, shared, contexts, rollouts)
        # Sum over stop symbols s of p(s | z) p(after | z s); with z in `given` the symbol is conditioned on.
        log_stop = shared.log_stop
        if self._z_in_given:
            log_stop = log_stop.log_softmax(1)
        return log_r + (log_stop + after).logsumexp(1)

    def _check_lengths(self, contexts: list[Context], rollouts: Rollouts) -> None:
        for before, after in {(len(c.before), len(c.after)) for c in contexts}:
            total = before + rollouts.tokens.shape[1] + 1 + after
            self.lm.check_context(before, total, f"{self!r} with its completion")

    def _prefix(self, scoring: Scoring, prompts: Prompts) -> Prefix:
        """The encoded prompts. Chunk after chunk may have the same: then they are those of the last one."""
        key = ("prefix", id(self))
        if scoring.lasting.get(key, (None,))[0] != prompts:
            scoring.lasting.pop(key, None)  # before the next is made
            scoring.lasting[key] = (prompts, self.lm.passes.encode(prompts))
        return scoring.lasting[key][1]

    def _log_before(self, scoring: Scoring, contexts: list[Context]) -> Tensor:
        """[N] log-probability of the part of `of` that stands before z: constant, but part of log Z."""
        known = scoring.lasting.setdefault(("before", id(self)), {})
        for c in contexts:
            key = (*c.before, c.before_scored)
            if key not in known:
                known[key] = self.lm.passes.last_log_probs(c.before, c.before_scored).sum()
        return torch.stack([known[(*c.before, c.before_scored)] for c in contexts])


def completion_pass(lm: CausalLM, prefix: Prefix, rollouts: Rollouts) -> CompletionPass:
    logits, cache = lm.passes.states(prefix, rollouts.row_index, rollouts.tokens)
    norm = log_norms(logits)
    log_tok = logits[:, :-1].gather(-1, rollouts.tokens[..., None]).squeeze(-1).float() - norm[:, :-1]
    stops = torch.tensor(rollouts.stop_ids, device=logits.device)
    log_stop = logits[..., stops].float().movedim(-1, 1) - norm[:, None]
    return CompletionPass(prefix, cache, log_tok, log_stop)


@dataclass(frozen=True)
class Branches:
    """The branches to score: for each trajectory, (state, stop symbol) pairs and the text after them.

    state, stop   [B, M] long: state, and number of the stop symbol, of each branch; the first `count` are valid
    count         [B] number of branches
    text, scored  [B, L] tokens, padded on the right, and whether each is scored
    length        [B] tokens of the text
    """

    state: Tensor
    stop: Tensor
    count: Tensor
    text: Tensor
    scored: Tensor
    length: Tensor

    @classmethod
    def of(cls, contexts: list[Context], rollouts: Rollouts, mask: Tensor) -> Branches:
        """The branches at the states in mask [B, T+1]."""
        n_stops, device = len(rollouts.stop_ids), rollouts.tokens.device
        states = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
        state = states.repeat_interleave(n_stops, dim=1)
        stop = torch.arange(n_stops, device=device).repeat(states.shape[1]).expand_as(state)

        text, length = pad_right([c.after for c in contexts], device)
        start = length - torch.tensor([c.after_scored for c in contexts], device=device)
        position = torch.arange(text.shape[1], device=device)
        scored = (position >= start[:, None]) & (position < length[:, None])
        row = rollouts.row_index
        count = torch.where(length[row] > 0, mask.sum(1) * n_stops, 0)
        return cls(state, stop, count, text[row], scored[row], length[row].clamp(min=1))


def score_branches(
    lm: CausalLM, shared: CompletionPass, contexts: list[Context], rollouts: Rollouts
) -> Tensor:
    """[B, S, T+1] log p(scored text after z | prompt z_1:t s); 0 where stopping is not allowed.

    A state that several trajectories share is scored once. A pack holds as many branches of one trajectory as fit into
    `width` tokens. Packs of about the same length share a pass, as many as the memory budget allows. If packs are not
    exact for the model, each branch is scored as a text of its own.
    """
    owner = owners(rollouts)
    own = owner == torch.arange(len(rollouts), device=owner.device)[:, None]
    branches = Branches.of(contexts, rollouts, own & rollouts.stop_mask)
    out = torch.zeros(len(rollouts), len(rollouts.stop_ids), rollouts.stop_mask.shape[1], device=lm.device)
    longest = max(len(c.before) + len(c.after) for c in contexts) + rollouts.stop_mask.shape[1]
    if shared.cache is None or not lm.passes.packs(longest):
        _score_each(lm, shared.prefix, rollouts, branches, out)
        return out.gather(0, owner[:, None].expand_as(out))
    held = shared.prefix.held + cache_bytes(shared.cache)
    past, text = shared.prefix.longest + rollouts.tokens.shape[1], int(branches.length.max())
    # At least a branch, and no more than MAX_WIDTH, since attention is quadratic in it.
    width = max(
        text, min(MAX_WIDTH, lm.passes.fit(lm.passes.branch_bytes(past, MAX_WIDTH) / MAX_WIDTH, held))
    )
    at_once = lm.passes.fit(lm.passes.branch_bytes(past, width), held)
    per_pack = width // branches.length
    n_packs = -(-branches.count // per_pack)
    rows = torch.arange(len(rollouts), device=lm.device).repeat_interleave(n_packs)
    first = (torch.arange(len(rows), device=lm.device) - (n_packs.cumsum(0) - n_packs)[rows]) * per_pack[rows]
    last = torch.minimum(first + per_pack[rows], branches.count[rows])
    for group in length_groups((last - first) * branches.length[rows]):
        for part in group.split(at_once) if len(group) > 0 else ():  # there may be no state to score
            _score_packs(lm, shared, rollouts, branches, rows[part], first[part], last[part], out)
    return out.gather(0, owner[:, None].expand_as(out))


def _score_each(lm: CausalLM, prefix: Prefix, rollouts: Rollouts, branches: Branches, out: Tensor) -> None:
    """Write log p of every branch to `out`, each scored as a text of its own after its prompt."""
    z, passes = rollouts.completions(), lm.passes
    valid = torch.arange(branches.state.shape[1], device=out.device) < branches.count[:, None]
    past, length = prefix.longest + rollouts.stop_mask.shape[1], branches.text.shape[1]
    # The cache up to the stop symbol is one of the text's own.
    each = passes.scored_bytes(past, length) + 2 * past * passes.sizes.cache
    for rows, k in (part.unbind(1) for part in valid.nonzero().split(passes.fit(each, prefix.held))):
        state, stop, text = branches.state[rows, k], branches.stop[rows, k], branches.text[rows]
        where = zip(rows.tolist(), state.tolist(), stop.tolist(), strict=True)
        before = [[*z[b][:t], rollouts.stop_ids[s]] for b, t, s in where]
        whole = passes.extend(prefix, rollouts.row_index[rows], before)
        logits = passes.state_logits(whole, torch.arange(len(rows), device=out.device), text[:, :-1])
        log_p = torch.where(branches.scored[rows], gather_log_probs(logits, text), 0.0)
        out[rows, stop, state] = log_p.sum(1)


def owners(rollouts: Rollouts) -> Tensor:
    """[B, T+1] the first trajectory of the same row that may stop at the same z_1:t. Where a trajectory may not stop,
    it is its own owner."""
    mask, size = rollouts.stop_mask, len(rollouts)
    itself = torch.arange(size, device=mask.device)
    vocabulary = int(rollouts.tokens.max()) + 1
    prefix = rollouts.row_index  # z_1:t of a row, as a number
    columns = []
    for t in range(mask.shape[1]):
        key = prefix * vocabulary + rollouts.tokens[:, t - 1] if t else prefix
        prefix = key.unique(return_inverse=True)[1]
        stopping = torch.where(mask[:, t], itself, size)
        first = torch.full_like(itself, size).scatter_reduce(0, prefix, stopping, "amin")
        columns.append(torch.where(mask[:, t], first[prefix], itself))
    return torch.stack(columns, 1)


def _score_packs(
    lm: CausalLM,
    shared: CompletionPass,
    rollouts: Rollouts,
    branches: Branches,
    rows: Tensor,
    first: Tensor,
    last: Tensor,
    out: Tensor,
) -> None:
    """Add log p of b packs to `out`: branches first..last-1 (each [b]) of the trajectories `rows` [b]."""
    length = branches.length[rows, None]
    used = (last - first)[:, None] * length
    column = torch.arange(int(used.max()), device=lm.device)
    # The branch that token `column` of a pack belongs to, and its offset in the branch.
    branch = (first[:, None] + column // length).clamp(max=branches.state.shape[1] - 1)
    offset = column % length
    state, stop = branches.state[rows].gather(1, branch), branches.stop[rows].gather(1, branch)
    text = branches.text[rows]
    # Input: the stop symbol, then the text without its last token; output: the text.
    symbols = torch.tensor(rollouts.stop_ids, device=lm.device)[stop]
    ids = torch.where(offset == 0, symbols, text.gather(1, (offset - 1).clamp(min=0)))
    past = shared.prefix.mask[rollouts.row_index[rows]]
    allowed = branch_mask(past, state, branch, rollouts.stop_mask.shape[1])
    positions = past.sum(1, keepdim=True) + 1 + state + offset
    cache = select_cache(shared.cache, rows)
    assert cache is not None
    logits = lm.passes.branch_logits(ids, positions, allowed, cache)
    counts = branches.scored[rows].gather(1, offset) & (column < used)
    log_p = torch.where(counts, gather_log_probs(logits, text.gather(1, offset)), 0.0)
    out.index_put_((rows[:, None], stop, state), log_p, accumulate=True)
