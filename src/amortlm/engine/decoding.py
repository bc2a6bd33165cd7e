"""The one loop that writes completions, left to right on a support, without gradient.

Completions may begin with kept tokens; drawing is the case of no kept tokens. Each completion uses its own stream of
uniform numbers (inverse-CDF sampling), so the draws of a prompt do not depend on the other prompts in the batch, on
padding or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from amortlm.engine.passes import Passes
from amortlm.engine.prefix import Prefix, pad_right
from amortlm.errors import ConfigError
from amortlm.support.law import Step, SupportLaw
from amortlm.support.log_probs import at_once
from amortlm.support.tools import ToolRun
from amortlm.types import PolicyLogProbs

# Called after each step with those still being written: their numbers [b], their next tokens or stop symbols [b], and
# log q [b] of these, nats (of stopping: with any symbol; 0 for a tool's). Not for a stop that is certain at max_tokens.
Watch = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Exploration:
    """How sampling differs from the policy: a softmax temperature [B] for each completion, and a share `epsilon` of
    uniformly drawn tokens. Temperature 0 is greedy. Raises ConfigError for a temperature that is negative or infinite,
    and for epsilon outside [0, 1]."""

    temperature: Tensor | None = None
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        heat = self.temperature
        if heat is not None and not bool((torch.isfinite(heat) & (heat >= 0)).all()):
            raise ConfigError(
                f"a temperature must be a finite number, 0 (greedy) or above, not {heat.tolist()}"
            )
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"epsilon is a share of uniform tokens, between 0 and 1, not {self.epsilon}")

    def select(self, index: Tensor | slice) -> Exploration:
        """That of the completions at `index`."""
        return self if self.temperature is None else replace(self, temperature=self.temperature[index])

    def to(self, device: torch.device) -> Exploration:
        return self if self.temperature is None else replace(self, temperature=self.temperature.to(device))

    def probabilities(self, step: Step, text: Tensor, completion: Tensor) -> Tensor:
        """[b, V] probabilities of the next token of `completion` [b] (numbers), after the step's texts `text` [b]."""
        if self.temperature is None and self.epsilon == 0:
            return step.log_q[text].exp_()
        log_p = (
            step.log_q[text] if self.temperature is None else self._tempered(step.logits[text], completion)
        )
        legal = step.legal[text]
        uniform = legal / legal.sum(-1, keepdim=True)
        return log_p.exp() if self.epsilon == 0 else (1 - self.epsilon) * log_p.exp() + self.epsilon * uniform

    def _tempered(self, logits: Tensor, completion: Tensor) -> Tensor:
        assert self.temperature is not None
        heat = self.temperature.to(logits)[completion, None]
        # Relative to the likeliest token, so that no temperature overflows. At temperature 0, the first of equal ones.
        scaled = (logits - logits.amax(-1, keepdim=True)) / heat
        greedy = torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        return torch.where(heat > 0, scaled, greedy).log_softmax(-1)


@dataclass(frozen=True)
class Draws:
    """B completions and their log q under the policy itself, nats. T is max_tokens, or the length of the longest.

    tokens     [B, T]    0 beyond the length
    lengths    [B]       tokens, without the stop
    stops      [B]       stop symbols
    log_pf     [B, T]    log q of each token; 0 beyond the length and for tokens of a tool
    log_pterm  [B, T+1]  log q(stop) at the states reached, -inf at others
    version    version of the weights that drew them (the oldest)
    """

    tokens: Tensor
    lengths: Tensor
    stops: Tensor
    log_pf: Tensor
    log_pterm: Tensor
    version: int = 0

    @classmethod
    def blank(cls, count: int, law: SupportLaw, device: torch.device) -> Draws:
        """Draws without any token yet, with T = max_tokens."""
        width = law.max_tokens
        return cls(
            tokens=torch.zeros(count, width, dtype=torch.long, device=device),
            lengths=torch.full((count,), width, device=device),
            stops=torch.full((count,), law.stop_ids[0], device=device),
            log_pf=torch.zeros(count, width, device=device),
            log_pterm=torch.full((count, width + 1), -torch.inf, device=device),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def log_q(self) -> Tensor:
        """[B] float64 log q(z), the stop included."""
        return PolicyLogProbs(self.log_pf.double(), self.log_pterm.double()).final(self.lengths)

    def select(self, index: Tensor) -> Draws:
        return self._map(lambda x: x[index])

    def where(self, mask: Tensor, other: Draws) -> Draws:
        """A copy with the draws of `other` where mask [B] is True."""
        return self._map(lambda x, y: torch.where(mask if x.dim() == 1 else mask[:, None], y, x), other)

    def put(self, index: Tensor, other: Draws) -> Draws:
        """A copy in which `other` replaces the draws at `index`."""
        return self._map(lambda x, y: x.index_copy(0, index, y), other)

    def cut(self, keep: Tensor) -> Draws:
        """A copy with only the first keep [B] tokens and their log q; the rest is still to be drawn."""
        t = torch.arange(self.log_pterm.shape[1], device=keep.device)
        gone = t >= keep[:, None]
        return replace(
            self,
            tokens=self.tokens.masked_fill(gone[:, :-1], 0),
            lengths=torch.full_like(self.lengths, self.tokens.shape[1]),
            stops=self.stops.clone(),
            log_pf=self.log_pf.masked_fill(gone[:, :-1], 0.0),
            log_pterm=self.log_pterm.masked_fill(gone, -torch.inf),
        )

    def trimmed(self) -> Draws:
        """A copy without the columns that no completion reaches."""
        width = max(int(self.lengths.max()), 1)
        return replace(
            self,
            tokens=self.tokens[:, :width],
            log_pf=self.log_pf[:, :width],
            log_pterm=self.log_pterm[:, : width + 1],
        )

    def widened(self, width: int) -> Draws:
        """A copy with T = width, at least its own."""
        more = width - self.tokens.shape[1]
        return replace(
            self,
            tokens=pad(self.tokens, (0, more)),
            log_pf=pad(self.log_pf, (0, more)),
            log_pterm=pad(self.log_pterm, (0, more), value=-torch.inf),
        )

    @staticmethod
    def cat(parts: Sequence[Draws]) -> Draws:
        """One after the other; of one width. The version is the oldest."""
        joined = parts[0]._map(lambda *x: torch.cat(x), *parts[1:])
        return replace(joined, version=min(part.version for part in parts))

    def _map(self, change: Callable[..., Tensor], *others: Draws) -> Draws:
        names = [name for name, x in vars(self).items() if isinstance(x, Tensor)]
        changed: dict[str, Any] = {
            name: change(*(getattr(draws, name) for draws in (self, *others))) for name in names
        }
        return replace(self, **changed)


def watched(draws: Draws, law: SupportLaw, watch: Watch) -> None:
    """Call `watch` as the decoding loop would have, for draws that were made elsewhere."""
    number = torch.arange(len(draws))
    tokens, lengths = draws.tokens.cpu(), draws.lengths.cpu()
    log_pf, log_pterm, stops = draws.log_pf.cpu(), draws.log_pterm.cpu(), draws.stops.cpu()
    shown = law.max_tokens + (len(law.stop_ids) > 1)  # of one stop symbol, that at max_tokens is certain
    for t in range(shown):
        going = number[lengths >= t]
        ends = lengths[going] == t
        token, log_q = stops[going].clone(), log_pterm[going, min(t, log_pterm.shape[1] - 1)].clone()
        if not bool(ends.all()):
            at = going[~ends]
            token[~ends], log_q[~ends] = tokens[at, t], log_pf[at, t]
        if len(going):
            watch(going, token, log_q)


class Frontier:
    """The distinct texts (prompt and tokens so far) of the completions being drawn. Completions with the same text
    share it, so it goes through the model once."""

    def __init__(
        self,
        passes: Passes,
        law: SupportLaw,
        prefix: Prefix,
        index: Tensor,
        kept: Sequence[Sequence[int]] | None = None,
    ):
        """B completions of the prompts at index [B], which begin with the tokens kept[b].

        Attributes: text [B], the number of each completion's text; t, node [n], length and automaton node of each text.
        """
        self.law = law
        if kept is None:
            prompt, self.text = index.unique(return_inverse=True)
            self.t, self.node = torch.zeros_like(prompt), torch.zeros_like(prompt)
            self._writer = passes.write(prefix, prompt)
            return
        begun = [(i, *z) for i, z in zip(index.tolist(), kept, strict=True)]
        number = {text: n for n, text in enumerate(dict.fromkeys(begun))}
        self.text = torch.tensor([number[text] for text in begun], device=index.device)
        tokens, self.t = pad_right([z for _, *z in number], index.device)
        texts = torch.arange(len(number), device=index.device)
        self.node = law.nodes(tokens)[texts, self.t]
        prompt = torch.tensor([i for i, *_ in number], device=index.device)
        self._writer = passes.write(passes.extend(prefix, prompt, [z for _, *z in number]), texts)

    def step(self) -> Step:
        """The next step of each of the n texts. Call it once after each `append`."""
        return self.law.step(self._writer.logits(), self.t, self.node)

    def append(self, text: Tensor, token: Tensor) -> Tensor:
        """Append tokens [b] to texts [b], and drop all other texts. Returns the numbers [b] of the new texts."""
        size = len(self.law.allowed)
        pairs, text = (text * size + token).unique(return_inverse=True)
        parent, ids = pairs // size, pairs % size
        self.t, self.node = self.t[parent] + 1, self.law.advance(self.node[parent], ids)
        self._writer.append(parent, ids)
        return text


@torch.no_grad()
def decode(
    passes: Passes,
    law: SupportLaw,
    prefix: Prefix,
    index: Tensor,
    uniforms: Tensor,
    exploration: Exploration | None = None,
    kept: Draws | None = None,
    keep: Tensor | None = None,
    watch: Watch | None = None,
    pack: Callable[..., Draws] | None = None,
    until: int | None = None,
) -> Draws:
    """Draw one completion for each of `index` [B], the number of its prompt in `prefix`. uniforms [B, max_tokens + 1].

    kept, keep [B]: completion b begins with the first keep[b] tokens of `kept`, whose log q stays. Exploration
    changes what is drawn, not the log q. Draws come at the full width, max_tokens. They are made in packs that fit the
    memory setting, those of a prompt together. What `watch` raises ends the loop.
    pack: what draws a pack in place of `decode_pack`, with its arguments. until: completions that reach so many tokens,
    fewer than max_tokens, are left unfinished there: of this length, with log q of their tokens alone.
    """
    exploration, law = (exploration or Exploration()).to(index.device), law.to(index.device)
    write = partial(decode_pack, until=until) if until is not None else pack or decode_pack
    each = passes.written_bytes(prefix.longest, law.max_tokens, kept is not None)
    size = passes.fit(each, prefix.held)
    if len(index) <= size:
        return write(passes, law, prefix, index, uniforms, exploration, kept, keep, watch)
    order = index.argsort(stable=True)
    packs = order.tensor_split(-(-len(order) // size))  # of even size
    parts = [
        write(
            passes,
            law,
            prefix,
            index[rows],
            uniforms[rows],
            exploration.select(rows),
            None if kept is None else kept.select(rows),
            None if keep is None else keep[rows],
            renumbered(watch, rows),
        )
        for rows in packs
    ]
    return Draws.cat(parts).select(order.argsort())


def renumbered(watch: Watch | None, number: Tensor) -> Watch | None:
    """The same for a part of the completions, those with these numbers [b]."""
    return None if watch is None else (lambda at, token, log_q: watch(number[at], token, log_q))


def begin(
    law: SupportLaw, index: Tensor, kept: Draws | None, keep: Tensor | None
) -> tuple[Draws, list[list[int]] | None]:
    """(draws that are still to be made, the tokens with which each begins: None if there are none)."""
    if kept is None or keep is None:
        return Draws.blank(len(index), law, index.device), None
    out = kept.cut(keep)
    out.stops.fill_(law.stop_ids[0])
    return out, [z[:n] for z, n in zip(out.tokens.tolist(), keep.tolist(), strict=True)]


def decode_pack(
    passes: Passes,
    law: SupportLaw,
    prefix: Prefix,
    index: Tensor,
    uniforms: Tensor,
    exploration: Exploration,
    kept: Draws | None,
    keep: Tensor | None,
    watch: Watch | None,
    until: int | None = None,
) -> Draws:
    """`decode` of one pack."""
    width, last, end = law.max_tokens, law.last_state, law.max_tokens
    if until is not None:
        end, last = until, until - 1
    out, begun = begin(law, index, kept, keep)
    frontier = Frontier(passes, law, prefix, index, begun)
    tools = ToolRun(law.tool, len(index)) if law.tool is not None else None
    alive = (frontier.t[frontier.text] <= last).nonzero().squeeze(1)
    text = frontier.text[alive]
    while len(alive) > 0:
        step, t = frontier.step(), frontier.t[text]
        token = drawn(exploration, step, text, alive, uniforms[alive, t])
        log_p, log_stop = step.log_q[text, token], step.log_stop[text]
        del step  # before the next one is made
        stops = torch.isin(token, law.symbols)
        if tools is not None:
            written = tools.forced(alive).masked_fill(t >= width, -1)
            theirs = written >= 0
            token, stops = torch.where(theirs, written, token), stops & ~theirs
            log_p, log_stop = log_p.masked_fill(theirs, 0.0), log_stop.masked_fill(theirs, -torch.inf)
        if watch is not None:
            watch(alive, token, torch.where(stops, log_stop, log_p))
        out.log_pterm[alive, t] = log_stop
        out.lengths[alive] = torch.where(stops, t, width)
        out.stops[alive] = torch.where(stops, token, out.stops[alive])
        # Numbers, not truth values, as indices: how many there are is asked of a GPU once, not for each tensor.
        on = (~stops).nonzero().squeeze(1)
        alive, text, t, token, log_p = (x[on] for x in (alive, text, t, token, log_p))
        out.tokens[alive, t], out.log_pf[alive, t] = token, log_p
        if tools is not None:
            tools.advance(alive, out.tokens, t)
        on = (t < last).nonzero().squeeze(1)
        alive, text, token = (x[on] for x in (alive, text, token))
        if len(alive) > 0:
            text = frontier.append(text, token)
    out.lengths.clamp_(max=end)
    out.log_pterm[out.lengths == end, end] = 0.0
    return out


def drawn(exploration: Exploration, step: Step, text: Tensor, completion: Tensor, u: Tensor) -> Tensor:
    """[b] the next tokens of completions [b] at the step's texts [b]; a few at a time, since each has copies of its
    own of what is as wide as the vocabulary."""
    size = at_once(u.device, step.log_q.shape[1])
    parts = zip(text.split(size), completion.split(size), u.split(size), strict=True)
    return torch.cat([_inverse_cdf(exploration.probabilities(step, x, c), v) for x, c, v in parts])


def _inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """[b] the first token whose cumulative probability exceeds u [b]: never one of probability 0."""
    cdf = probabilities.double().cumsum_(-1)
    token = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=probabilities.shape[-1] - 1)
