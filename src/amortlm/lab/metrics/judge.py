"""Which of two texts is better? A judge is any function; two are built in."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence

import torch

from amortlm.errors import ConfigError, DataError, RewardError
from amortlm.language_model import LanguageModel

# (context, a, b) -> how surely a is the better continuation of the context, in [0, 1]; 0.5: no preference.
Judge = Callable[[str, str, str], float]

QUESTION = (
    "Text:\n{context}\n\nTwo candidates for what comes next:\nA: {a}\nB: {b}\n\n"
    "Which candidate fits the text better? Answer with the letter A or B only."
)


def preferences(contexts: Sequence[str], a: Sequence[str], b: Sequence[str], judge: Judge) -> list[float]:
    """For every example how surely a beats b, in [0, 1]: the mean over both orders of asking, since judges favour
    a position. Raises DataError for lists of different lengths or none, RewardError for an answer outside [0, 1]."""
    if not len(contexts) == len(a) == len(b) or not len(a):
        raise DataError(
            f"{len(contexts)} contexts, {len(a)} and {len(b)} texts: give one for one, at least one"
        )
    return [
        (_ask(judge, c, first, second) + 1 - _ask(judge, c, second, first)) / 2
        for c, first, second in zip(contexts, a, b, strict=True)
    ]


def _ask(judge: Judge, context: str, a: str, b: str) -> float:
    value = float(judge(context, a, b))
    if not 0 <= value <= 1:
        raise RewardError(f"the judge answered {value} for {a!r} against {b!r}; it must be in [0, 1]")
    return value


def lm_judge(lm: LanguageModel, given: str = "{context}") -> Judge:
    """A judge that compares log p(text | given) per token: sigmoid of the difference in nats.

    given: what stands before the text, with `{context}` in it. The comparison is per token, since the shorter text
    would win otherwise. It says only which text the model finds more fluent there.
    """
    if given.count("{context}") != 1:
        raise ConfigError(f"given={given!r} must contain {{context}} once")

    @torch.no_grad()
    def mean_log_prob(context: str, text: str) -> float:
        before = lm.encode_start(given.replace("{context}", context))
        tokens = lm.encode_continuation(text)
        if not tokens:
            raise DataError("the judge got an empty text")
        lm.check_context(len(before), len(before) + len(tokens), "the judged text with its context")
        return lm.passes.log_probs([[*before, *tokens]])[0, -len(tokens) :].mean().item()

    def judge(context: str, a: str, b: str) -> float:
        return 0.5 * (1 + math.tanh((mean_log_prob(context, a) - mean_log_prob(context, b)) / 2))

    return judge


def served_judge(
    url: str,
    model: str,
    *,
    question: str = QUESTION,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> Judge:
    """A judge behind an OpenAI-compatible chat endpoint: one POST of JSON to `url` per question.

    url: the full address, .../v1/chat/completions; question: with {context}, {a} and {b}; headers: authorisation,
    where the server wants one; timeout in seconds. Raises RewardError when the server fails or answers neither
    A nor B.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no http address; give the one of the chat endpoint")
    missing = [name for name in ("{context}", "{a}", "{b}") if name not in question]
    if missing:
        raise ConfigError(f"the judge's question has no {missing[0]}")

    def judge(context: str, a: str, b: str) -> float:
        answer = _chat(url, model, fill(question, context=context, a=a, b=b), headers or {}, timeout)
        letter = re.fullmatch(r"\W*([AB])\W*", answer)
        if letter is None:
            raise RewardError(f"the judge at {url} answered {answer[:80]!r} instead of A or B")
        return 1.0 if letter[1] == "A" else 0.0

    return judge


def fill(template: str, **texts: str) -> str:
    """The template with its {names} filled in; braces inside the texts stay as they are."""
    names = "|".join(texts)
    return re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], template)


def _chat(url: str, model: str, question: str, headers: Mapping[str, str], timeout: float) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise RewardError(
            f"the judge at {url} gave no answer ({e}); check the address, the model name {model!r} "
            "and the server"
        ) from e
