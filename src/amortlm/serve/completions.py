"""Answers in the form of OpenAI's completions API, with the log-probabilities and weights of the samples."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from amortlm.posterior import Ask, Posterior, Sample
from amortlm.serve.bodies import CompletionBody
from amortlm.serve.drawing import Drawn, Pieces, PlainDraw
from amortlm.serve.refusals import RequestError, request_error
from amortlm.serve.wire import Inbox, as_json, future_of, too_late
from amortlm.serve.worker import Call, Work
from amortlm.types import Row


def work_for(
    body: CompletionBody, row: Row, seed: int, posterior: Posterior, draws: int, inbox: Inbox | None
) -> Work:
    """The work that draws a request's completions; its result is `Drawn`. draws: most of a correction."""
    if body.correct == "none" and body.budget is None:
        tell = None if inbox is None else inbox.put
        return PlainDraw(Ask(row, body.n, seed), tell, wants_pieces=body.logprobs is not None)
    budget = body.budget
    if budget is None and body.correct != "none":
        budget = min(max(256, 16 * body.n), draws)

    def corrected() -> Drawn:
        samples = posterior.sample(row, body.n, correct=body.correct, budget=budget, seed=seed)
        return Drawn(samples, len(posterior.policy.encode_rows([row])[0]))

    return Call(corrected)


@dataclass(frozen=True)
class Form:
    """The answer to one request, whole or in events. seed: that of the draws, also if the request had none."""

    model: str
    seed: int
    longest: int  # max_tokens of the support
    with_usage: bool = False  # in a stream
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, drawn: Drawn) -> dict[str, Any]:
        pieces: Sequence[Pieces | None] = drawn.pieces or [None] * len(drawn.samples)
        choices = [
            self._finished(i, sample, sample.text) | {"logprobs": None if p is None else log_probs(p)}
            for i, (sample, p) in enumerate(zip(drawn.samples, pieces, strict=True))
        ]
        return self._completion(choices) | {"usage": usage(drawn), "amortlm": self._how(drawn)}

    async def events(self, inbox: Inbox, work: Work, deadline: float) -> AsyncIterator[str]:
        """The texts as they grow; then all choices with the rest of their texts, their figures and how they were drawn;
        then [DONE]. An error ends the events."""
        done, sent = future_of(work), dict[int, str]()
        loop = asyncio.get_running_loop()
        while not done.done():
            filled = asyncio.ensure_future(inbox.filled.wait())
            seconds = max(deadline - loop.time(), 0)
            await asyncio.wait({done, filled}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            filled.cancel()
            if not done.done() and loop.time() >= deadline:
                yield as_json(too_late().to_dict())
                return
            if not done.done() and (texts := inbox.take()):
                for i, text in texts.items():
                    sent[i] = sent.get(i, "") + text
                yield as_json(self._completion([choice(i, text) for i, text in texts.items()]))
        try:
            drawn = done.result()
        except Exception as e:
            yield as_json(request_error(e).to_dict())
            return
        for event in self._last(drawn, sent):
            yield event

    def _last(self, drawn: Drawn, sent: dict[int, str]) -> Iterator[str]:
        choices = [
            self._finished(i, sample, sample.text[len(sent.get(i, "")) :])
            for i, sample in enumerate(drawn.samples)
        ]
        yield as_json(self._completion(choices) | {"amortlm": self._how(drawn)})
        if self.with_usage:
            yield as_json(self._completion([]) | {"usage": usage(drawn)})
        yield "[DONE]"

    def _completion(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _finished(self, i: int, sample: Sample, text: str) -> dict[str, Any]:
        why = "length" if len(sample.tokens) >= self.longest else "stop"
        figures = {"log_q": sample.log_q, "log_reward": sample.log_reward, "weight": sample.weight}
        statements = {} if sample.statements is None else {"statements": sample.statements}
        return choice(i, text, why) | figures | statements

    def _how(self, drawn: Drawn) -> dict[str, Any]:
        return {"seed": self.seed, **drawn.samples.summary()}


def choice(i: int, text: str, why: str | None = None) -> dict[str, Any]:
    return {"index": i, "text": text, "finish_reason": why, "logprobs": None}


def log_probs(pieces: Pieces) -> dict[str, Any]:
    """For each token, and last for stopping with any stop symbol: its piece of the text, log q (nats; 0 for a tool's
    tokens), and where the piece begins."""
    return {
        "tokens": pieces.texts,
        "token_logprobs": pieces.log_q,
        "top_logprobs": None,
        "text_offset": [0, *accumulate(map(len, pieces.texts))][:-1],
    }


def usage(drawn: Drawn) -> dict[str, int]:
    """Tokens of the prompt, and of the completions with their stop symbols."""
    written = sum(len(sample.tokens) + 1 for sample in drawn.samples)
    return {
        "prompt_tokens": drawn.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": drawn.prompt_tokens + written,
    }


def check_model(body: CompletionBody, name: str) -> None:
    if body.model not in (None, name):
        raise RequestError(
            404,
            f"there is no model {body.model!r} here, only {name!r}",
            param="model",
            code="model_not_found",
        )
