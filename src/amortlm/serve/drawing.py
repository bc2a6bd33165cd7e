"""Draws of several requests in one pass of the policy, on the model thread; and their texts, while they grow."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from amortlm.engine.decoding import Watch
from amortlm.engine.model import CausalLM
from amortlm.errors import ModelError
from amortlm.posterior import Ask, Posterior, Samples
from amortlm.serve.worker import Draw

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character, as Llama 2 has them
UNFINISHED = "\ufffd"


class Pieces:
    """The text of one completion, a piece for each token. The piece of a token is "" until its last character is
    complete, so that no piece is ever taken back.

    tokens  with the stop symbol, if it was drawn
    texts   their pieces
    log_q   of each token, nats
    """

    def __init__(self, lm: CausalLM, silent: set[int]):
        """silent: tokens that are not part of the text, special stop symbols."""
        self._lm, self._silent = lm, silent
        self.text = ""
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.log_q: list[float] = []

    def push(self, token: int, log_q: float) -> None:
        self.tokens.append(token)
        self.log_q.append(log_q)
        text = self._settled()
        grown = text[len(self.text) :] if text.startswith(self.text) else ""
        self.texts.append(grown)
        self.text += grown

    def finish(self, text: str, length: int) -> None:
        """The whole text is known, and the number of tokens with the stop symbol. Raises ModelError if the tokenizer
        changes the beginning of a text when more tokens follow."""
        if len(self.tokens) < length:  # the stop was certain
            self.texts.append("")
            self.log_q.append(0.0)
        if not text.startswith(self.text):
            raise ModelError(
                "the tokenizer of this model changes the beginning of a text when more tokens follow, so its texts "
                "cannot be cut into pieces: leave stream and logprobs out"
            )
        self.texts[-1] += text[len(self.text) :]
        self.text = text

    def _settled(self) -> str:
        """The text of the tokens, without a character that is not complete yet."""
        tokens = [token for token in self.tokens if token not in self._silent]
        while tokens and BYTE.fullmatch(str(self._lm.tokenizer.convert_ids_to_tokens(tokens[-1]))):
            tokens.pop()
        return self._lm.decode(tokens).rstrip(UNFINISHED) if tokens else ""


@dataclass(frozen=True)
class Drawn:
    """The samples of a request, the number of tokens of its prompt, and the pieces of each text if they were wanted."""

    samples: Samples
    prompt_tokens: int
    pieces: Sequence[Pieces] = ()


@dataclass(eq=False)
class PlainDraw(Draw):
    """The uncorrected samples of a request.

    tell          told, on the model thread, the number of a completion and the text by which it has grown
    wants_pieces  also without `tell`
    """

    ask: Ask
    tell: Callable[[int, str], None] | None = None
    wants_pieces: bool = False
    prompt_tokens: int = field(default=0, init=False)
    pieces: list[Pieces] = field(default_factory=list, init=False)
    _told: list[int] = field(default_factory=list, init=False)  # characters of each completion

    def __post_init__(self) -> None:
        self.size = self.ask.n

    def begin(self, posterior: Posterior) -> None:
        """Forget an earlier attempt, but not what was told of it: the next one draws the same."""
        if self.tell is None and not self.wants_pieces:
            return
        silent = posterior.lm.special_ids.intersection(posterior.policy.support.stop_ids)
        self.pieces = [Pieces(posterior.lm, silent) for _ in range(self.ask.n)]
        self._told = self._told or [0] * self.ask.n

    def push(self, i: int, token: int, log_q: float) -> None:
        if self.pieces:
            self.pieces[i].push(token, log_q)
            self._tell(i)

    def finish(self, samples: Samples) -> None:
        for i, (pieces, sample) in enumerate(zip(self.pieces, samples, strict=False)):
            pieces.finish(sample.text, len(sample.tokens) + 1)
            self._tell(i)
        self.future.set_result(Drawn(samples, self.prompt_tokens, self.pieces))

    def _tell(self, i: int) -> None:
        new = self.pieces[i].text[self._told[i] :]
        if new and self.tell is not None:
            self.tell(i, new)
            self._told[i] += len(new)


class _AbandonedError(Exception):
    """Nobody waits for any of the draws."""


def draw_together(posterior: Posterior, works: Sequence[PlainDraw]) -> None:
    """Draw for all works in one pass, and set their futures. A work that fails does not fail another: whose prompt does
    not fit is left out, and if the pass or the target fails, each work is done alone."""
    ready = []
    for work in works:
        try:
            work.prompt_tokens = len(posterior.policy.encode_rows([work.ask.row])[0])
            ready.append(work)
        except Exception as e:
            work.future.set_exception(e)
    if ready:
        _attempt(posterior, ready)


def _attempt(posterior: Posterior, works: Sequence[PlainDraw]) -> None:
    for work in works:
        work.begin(posterior)
    try:
        found = posterior.sample_each([work.ask for work in works], watch=_watch(works))
    except _AbandonedError:
        for work in works:
            work.future.set_result(None)
        return
    except Exception as e:
        if len(works) == 1:
            works[0].future.set_exception(e)
        for work in works if len(works) > 1 else ():
            _attempt(posterior, [work])
        return
    for work, samples in zip(works, found, strict=True):
        try:
            work.finish(samples)
        except Exception as e:
            work.future.set_exception(e)


def _watch(works: Sequence[PlainDraw]) -> Watch:
    places = [(work, i) for work in works for i in range(work.ask.n)]

    def watch(completion: Tensor, token: Tensor, log_q: Tensor) -> None:
        if all(work.gone for work in works):
            raise _AbandonedError
        if any(work.pieces for work in works):
            for b, *drawn in zip(completion.tolist(), token.tolist(), log_q.tolist(), strict=True):
                work, i = places[b]
                work.push(i, *drawn)

    return watch
