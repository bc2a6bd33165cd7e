"""The routes of the service. Everything that uses the model runs on its thread (`amortlm.serve.worker`)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from amortlm.errors import ConfigError, MissingExtraError

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from starlette.exceptions import HTTPException
except ImportError as e:
    raise MissingExtraError("a service needs fastapi and uvicorn: pip install 'amortlm[serve]'") from e

from amortlm import __version__
from amortlm.diagnostics.certificate import Certificate
from amortlm.posterior import Posterior
from amortlm.serve.bodies import (
    Body,
    CompletionBody,
    DiagnoseBody,
    EstimateBody,
    check_completion,
    check_count,
    parsed,
    row_of,
    seed_of_request,
)
from amortlm.serve.completions import Form, check_model, work_for
from amortlm.serve.drawing import draw_together
from amortlm.serve.limits import Limits
from amortlm.serve.refusals import RequestError, is_expected, request_error
from amortlm.serve.wire import EventStream, Inbox, json_response, outcome, read_body
from amortlm.serve.worker import Call, Work, Worker

logger = logging.getLogger(__name__)
KEY = "AMORTLM_API_KEY"
FIGURES = ("mark", "reached", "level", "quantity", "step", "n", "seed", "versions")  # of a certificate


def create_app(
    posterior: Posterior,
    *,
    name: str = "posterior",
    limits: Limits | None = None,
    certificate: Certificate | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """An ASGI application that serves a posterior (docs/serving.md). From now on only the application may use it.

    name     of the model in requests and answers
    api_key  needed by all requests except /health, as `Authorization: Bearer`; default: the environment variable
             AMORTLM_API_KEY, if it is set. Without a key, let only this machine reach the application

    Routes of your own that use the model go through `app.state.service` (`Service`); the dependency `app.state.guard`
    lets through only who has the key.
    """
    service = Service(posterior, name, limits or Limits(), certificate)
    key = api_key or os.environ.get(KEY)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="amortlm", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.service, app.state.guard = service, Depends(_guard(key))
    app.include_router(open_routes())
    app.include_router(routes(service), dependencies=[app.state.guard])
    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app


class Service:
    """A posterior on its thread, and what requests may ask of it. Only the thread may put another in its place."""

    def __init__(self, posterior: Posterior, name: str, limits: Limits, certificate: Certificate | None):
        self.posterior, self.name, self.limits, self.certificate = posterior, name, limits, certificate
        self.ending = False  # the server has been told to end, and waits for its connections
        self.worker = Worker(lambda works: draw_together(self.posterior, works), limits.waiting)

    def submit(self, work: Work) -> None:
        try:
            self.worker.submit(work)
        except Exception as e:
            raise request_error(e) from None

    async def body(self, kind: type[Body], request: Request) -> Body:
        return parsed(kind, await read_body(request, self.limits.body, self.limits.seconds))

    async def complete(self, request: Request) -> Response:
        """The answer to a request for completions."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.limits.seconds
        body = await self.body(CompletionBody, request)
        check_model(body, self.name)
        check_completion(body, self.posterior, self.limits)
        row, seed = row_of(body, self.posterior), seed_of_request(body)
        inbox = Inbox() if body.stream else None
        work = work_for(body, row, seed, self.posterior, self.limits.draws, inbox)
        self.submit(work)
        done = await outcome(request, work, deadline - clock(), inbox)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        form = Form(self.name, seed, self.posterior.policy.support.max_tokens, with_usage)
        if inbox is None or (done.done() and done.exception() is not None):
            return json_response(form.whole(_result(done)))
        return EventStream(form.events(inbox, work, deadline), work, deadline - clock())

    async def run(self, request: Request, function: Callable[[], Any]) -> Any:
        """The result of any function, run on the model's thread. Raises RequestError."""
        work = Call(function)
        self.submit(work)
        return _result(await outcome(request, work, self.limits.seconds))

    async def estimate(self, request: Request) -> dict[str, Any]:
        body = await self.body(EstimateBody, request)
        row = self._row(body)
        found = await self.run(request, lambda: self.posterior.estimate(row, body.n, seed=body.seed or 0))
        return dict(found.to_dict())

    async def diagnose(self, request: Request) -> dict[str, Any]:
        body = await self.body(DiagnoseBody, request)
        row = self._row(body)
        settings: dict[str, Any] = {"level": body.level, "limit": self.limits.draws, "seed": body.seed or 0}
        found = await self.run(request, lambda: self.posterior.diagnose(row, body.n, **settings))
        return dict(found.to_dict())

    def _row(self, body: EstimateBody) -> Any:
        check_count("n", body.n, self.limits.draws)
        return row_of(body, self.posterior)

    def describe(self) -> dict[str, Any]:
        """What is served: model, prompt, columns, support and target as written, and the certificate's figures."""
        posterior, policy = self.posterior, self.posterior.policy
        known = self.certificate
        model = posterior.lm.name
        return {
            "name": self.name,
            "model": Path(model).name if Path(model).expanduser().exists() else model,
            "prompt": policy.prompt.source,
            "columns": sorted(posterior.columns),
            "support": _stated(policy.support_spec.to_dict, policy.support_spec),
            "target": posterior.target and _stated(posterior.target.to_spec, posterior.target),
            "certificate": known
            and {name: getattr(known, name) for name in FIGURES} | {"rows": len(known.rows)},
        }


def routes(service: Service) -> APIRouter:
    """The routes that need the key, if there is one."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(request)

    @router.get("/v1/models")
    async def models() -> Response:
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "amortlm"}
        return json_response({"object": "list", "data": [model]})

    @router.get("/posterior")
    async def posterior() -> Response:
        return json_response(service.describe())

    @router.post("/posterior/estimate")
    async def estimate(request: Request) -> Response:
        return json_response(await service.estimate(request))

    @router.post("/posterior/diagnose")
    async def diagnose(request: Request) -> Response:
        return json_response(await service.diagnose(request))

    return router


def open_routes() -> APIRouter:
    """The routes that need no key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    return router


def _guard(key: str | None) -> Callable[[Request], Awaitable[None]]:
    """A check of `Authorization: Bearer` that takes as long for a wrong key as for the right one."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), (key or "").encode())
        if key is not None and not known:
            raise RequestError(
                401,
                "give the key of this server: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _result(done: asyncio.Future[Any]) -> Any:
    error = done.exception()
    return done.result() if error is None else _fail(error)


def _fail(error: BaseException) -> NoReturn:
    if not is_expected(error):
        logger.error("a request failed", exc_info=error)
    raise request_error(error) from None


def _stated(state: Callable[[], Any], thing: Any) -> Any:
    """The JSON form of a support or target; of one that has none, what it is called."""
    try:
        return state()
    except ConfigError:
        return repr(thing)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = _unrouted(request, error)
    problem = request_error(error)
    return json_response(problem.to_dict(), problem.status, problem.headers)


def _unrouted(request: Request, error: HTTPException) -> RequestError:
    """What no route answers: the answer names those that there are."""
    status, headers = error.status_code, error.headers
    if status not in (404, 405) or error.detail != HTTPStatus(status).phrase:
        return RequestError(status, str(error.detail), headers=headers)
    known = request.app.openapi()["paths"]
    routes = sorted(f"{method.upper()} {path}" for path, methods in known.items() for method in methods)
    code = "unknown_route" if status == 404 else "wrong_method"
    why = "this server has no such route" if status == 404 else f"this route does not take {request.method}"
    return RequestError(status, f"{why}; there are", code=code, headers=headers, routes=routes)
