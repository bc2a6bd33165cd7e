"""Errors as clients see them: in the form of OpenAI's API, without tracebacks and without paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from amortlm.errors import AmortLMError, RewardError
from amortlm.serve.worker import ClosedError, QueueFullError

PATH = re.compile(r"(?<![\w.:/<])(?:~|[A-Za-z]:)?(?:[/\\]+[^\s/\\'\",:;()<>]+){2,}[/\\]?")
INVALID, SERVER = "invalid_request_error", "server_error"


class RequestError(Exception):
    """An answer that is an error. message: one sentence for the client; param: the parameter that it is about; routes:
    those of the server, which end the message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        routes: Sequence[str] = (),
    ):
        super().__init__(message)
        self.routes = routes
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        kind = INVALID if self.status < 500 else SERVER
        listed = f": {', '.join(self.routes)}" if self.routes else ""
        return {
            "error": {
                "message": without_paths(str(self)) + listed,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def request_error(error: BaseException) -> RequestError:
    """What a client is told of an error. What amortlm raises on purpose is about the request; of anything else only
    the log of the server speaks."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(
            429,
            "too many requests wait for the model: try again",
            code="queue_full",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, ClosedError):
        return RequestError(503, "the server is ending", code="closing")
    if isinstance(error, RewardError):
        return RequestError(422, _in_one_line(error), code="no_reward")
    if isinstance(error, AmortLMError):
        return RequestError(400, _in_one_line(error))
    if isinstance(error, RecursionError):
        return RequestError(400, "the request is nested too deeply")
    return RequestError(500, "the server failed at this request; its log says more", code="internal_error")


def is_expected(error: BaseException) -> bool:
    """Is the error about the request, so that the log of the server need not tell of it?"""
    return request_error(error).code != "internal_error"


def without_paths(text: str) -> str:
    return PATH.sub("[path]", text)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
