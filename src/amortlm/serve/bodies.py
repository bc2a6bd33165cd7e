"""The bodies of requests: read, checked, and turned into a row and settings. What would change nothing is accepted,
everything else that the posterior does not offer is refused."""

from __future__ import annotations

import json
import secrets
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amortlm.diagnostics.diagnose import LEVEL
from amortlm.errors import nearest
from amortlm.posterior import N, Posterior
from amortlm.serve.limits import Limits
from amortlm.serve.refusals import RequestError
from amortlm.types import Row

MOST = 2**63 - 1  # of a seed


class RowBody(BaseModel):
    """What every request about a row has: `prompt`, or `columns`; and a seed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Any = None
    columns: dict[str, Any] | None = None
    seed: int | None = Field(None, ge=-MOST, le=MOST)


class EstimateBody(RowBody):
    n: int = Field(N, ge=1)


class DiagnoseBody(EstimateBody):
    level: float = Field(LEVEL, gt=0, lt=1)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(RowBody):
    """OpenAI's parameters, and `columns`, `correct`, `budget`. Those of type Any must have their neutral value."""

    model: str | None = None
    n: int = Field(1, ge=1)
    correct: str = "none"
    budget: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0)
    user: str | None = None
    max_tokens: Any = None
    stop: Any = None
    temperature: Any = None
    top_p: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    suffix: Any = None
    echo: Any = None
    best_of: Any = None


SUPPORT = "the support of the posterior fixes it"
SAMPLER = "the samples are those of the posterior's sampler, and it would change their distribution"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {  # values without effect, and why others are refused
    "stop": (("", []), SUPPORT),
    "temperature": ((1,), SAMPLER),
    "top_p": ((1,), SAMPLER),
    "logit_bias": (({},), SAMPLER),
    "presence_penalty": ((0,), SAMPLER),
    "frequency_penalty": ((0,), SAMPLER),
    "suffix": (("",), "a text after the completion is a column of the posterior: give columns"),
    "echo": ((False,), "the answer holds completions only"),
}
Body = TypeVar("Body", bound=BaseModel)


def parsed(kind: type[Body], data: bytes) -> Body:
    """Raises RequestError for what is not JSON, and for a parameter that is unknown, twice there or of another type."""
    try:
        values = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise RequestError(400, f"the body is not JSON: {why}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body must be a JSON object of parameters")
    unknown = [name for name in values if name not in kind.model_fields]
    if unknown:
        why = f"unknown parameter {unknown[0][:80]!r}; {nearest(unknown[0], kind.model_fields)}"
        raise RequestError(400, why, code="unknown_parameter")
    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as e:
        raise _wrong_value(e) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _wrong_value(error: ValidationError) -> RequestError:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return RequestError(400, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", param=name)


def row_of(body: RowBody, posterior: Posterior) -> Row:
    """The row of a request. `prompt` is the text of the only column of a posterior that has one; a posterior without
    columns, and a request with `columns`, need none. Raises RequestError."""
    needed = sorted(posterior.columns)
    names = ", ".join(needed)
    if body.columns is None and len(needed) == 1 and body.prompt is not None:
        if not isinstance(body.prompt, str):
            raise RequestError(
                400,
                "prompt must be one text; send a request for each of several, they are drawn together, and chat "
                f"messages in columns: {{{json.dumps(needed[0])}: [...]}}",
                param="prompt",
            )
        return {needed[0]: body.prompt}
    if body.prompt not in (None, ""):
        how = f"has the columns {names}: give columns" if needed else "has no columns: leave prompt out"
        raise RequestError(
            400, f"this posterior {how}; prompt is for posteriors with one column", param="prompt"
        )
    row = body.columns or {}
    missing = [name for name in needed if row.get(name) is None]
    if missing:
        raise RequestError(
            400,
            f"columns must hold a value for each of {names}; missing: {', '.join(missing)}",
            param="columns",
        )
    return row


def seed_of_request(body: RowBody) -> int:
    return secrets.randbits(62) if body.seed is None else body.seed


def check_completion(body: CompletionBody, posterior: Posterior, limits: Limits) -> None:
    """Raise RequestError for what the posterior cannot do, or the server does not allow."""
    for name, (values, why) in NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise RequestError(
                400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter"
            )
    if body.best_of not in (None, body.n):
        raise RequestError(
            400,
            "best_of is not supported: all n completions are returned, with their weights",
            param="best_of",
            code="unsupported_parameter",
        )
    _check_max_tokens(body.max_tokens, posterior)
    check_count("n", body.n, limits.n)
    if body.budget is not None:
        check_count("budget", body.budget, limits.draws)
    if body.logprobs is not None:
        _check_logprobs(body)
    if body.stream and body.correct != "none":
        raise RequestError(
            400,
            "corrected completions are chosen after all are drawn, so they cannot be streamed: leave stream out",
            param="stream",
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options is for stream: true", param="stream_options")


def _check_max_tokens(given: Any, posterior: Posterior) -> None:
    longest = posterior.policy.support.max_tokens + 1  # with the stop symbol
    if given is None or (type(given) is int and given >= longest):
        return
    raise RequestError(
        400,
        f"max_tokens is not supported: the support fixes the length, at most {longest} tokens with the stop symbol; "
        f"leave it out, or give {longest} or more",
        param="max_tokens",
        code="unsupported_parameter",
    )


def _check_logprobs(body: CompletionBody) -> None:
    why = None
    if body.logprobs:
        why = "those of other tokens are not kept; logprobs: 0 gives those of the tokens that were drawn"
    elif body.correct != "none":
        why = "corrected completions have none: leave correct out"
    elif body.stream:
        why = "a stream does not carry them: leave stream out"
    if why is not None:
        raise RequestError(400, f"logprobs: {why}", param="logprobs", code="unsupported_parameter")


def check_count(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(400, f"{name} may be at most {most:,} on this server, got {value:,}", param=name)
