"""The playground: a page on which a posterior is sampled, measured and, without a saved one, built and trained."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from amortlm.diagnostics.certificate import Certificate
from amortlm.errors import AmortLMError
from amortlm.inference.table import TOP
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior, Samples
from amortlm.report.verdict import judged
from amortlm.serve.app import Service, create_app
from amortlm.serve.bodies import EstimateBody, check_count, row_of
from amortlm.serve.limits import Limits
from amortlm.serve.refusals import RequestError, request_error
from amortlm.serve.setups import LONGEST, Setup
from amortlm.serve.training import Post, Training
from amortlm.serve.wire import EventStream, json_response
from amortlm.serve.worker import Background, Work
from amortlm.types import Row, finite

PAGE = Path(__file__).parent / "static" / "play.html"
TEXT = 2000  # characters of a column
UPDATES = 100
SECONDS = 900.0  # of a training
N = 128  # draws of a measurement: more may take longer than the time limit of a request


class Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PlayBody(EstimateBody):
    n: int = Field(8, ge=1)


class MeasureBody(EstimateBody):
    n: int = Field(N, ge=2)


class TrainBody(PlayBody):
    updates: int = Field(40, ge=1, le=UPDATES)
    seed: int | None = Field(None, ge=0, lt=2**31)


Asked = TypeVar("Asked", bound=EstimateBody)


def create_play(
    start: Posterior | LanguageModel,
    *,
    name: str = "play",
    limits: Limits | None = None,
    certificate: Certificate | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """`create_app` with the playground at / (docs/serving.md).

    start: a posterior; or a language model, for which the page builds posteriors and trains samplers. There is one
    posterior at a time, for all who have the page open.
    """
    settings: dict[str, Any] = {
        "name": name,
        "limits": limits,
        "certificate": certificate,
        "api_key": api_key,
    }
    if isinstance(start, Posterior):
        app = create_app(start, **settings)
        play = Playground(app.state.service)
    else:
        app = create_app(Setup().posterior(start), **settings)
        play = Workshop(app.state.service, start)
        app.include_router(_building(play), dependencies=[app.state.guard])
    app.include_router(_page())
    app.include_router(_routes(play), dependencies=[app.state.guard])
    return app


class Playground:
    """What the page may ask of a service besides the service's own requests."""

    def __init__(self, service: Service):
        self.service = service

    def state(self) -> dict[str, Any]:
        """The posterior as `GET /posterior` has it, and what the page may ask. setup: None if it cannot be changed."""
        posterior = self.service.posterior
        target = None if posterior.target is None else repr(posterior.target)
        most = {"n": self.service.limits.n, "text": TEXT, "longest": LONGEST, "updates": UPDATES}
        return {
            **self.service.describe(),
            "written": {"target": target, "support": repr(posterior.policy.support_spec)},
            "setup": None,
            "trained": True,
            "training": False,
            "enumerable": self._is_enumerable(),
            "limits": most,
        }

    async def sample(self, request: Request) -> dict[str, Any]:
        """Draws of the model before training, of the sampler, and corrected ones, with one seed."""
        body, row = await self._asked(PlayBody, request)
        check_count("n", body.n, self.service.limits.n)
        seed = secrets.randbits(31) if body.seed is None else body.seed
        budget = min(max(256, 16 * body.n), self.service.limits.draws)
        if budget < body.n:
            raise RequestError(
                400, f"a correction may draw {budget:,} completions here: ask for fewer", param="n"
            )

        def columns() -> dict[str, Any]:
            posterior = self.service.posterior
            corrected = partial(posterior.sample, row, body.n, correct="sir", budget=budget, seed=seed)
            return {
                "seed": seed,
                "prompted": _column(partial(posterior.sample_prior, row, body.n, seed=seed)),
                "sampler": _column(partial(posterior.sample, row, body.n, seed=seed)),
                "corrected": _column(corrected),
            }

        found: dict[str, Any] = await self.service.run(request, columns)
        return found

    async def table(self, request: Request) -> dict[str, Any]:
        """The exact table of a small support."""
        _, row = await self._asked(PlayBody, request)
        most = self.service.limits.draws
        if not self._is_enumerable():
            raise RequestError(
                400, f"only supports of at most {most:,} completions are enumerated here: make them shorter"
            )
        found = await self.service.run(
            request, lambda: self.service.posterior.table(row, limit=most, top=TOP)
        )
        return {**found.to_dict(), "legend": found.legend}

    async def measure(self, request: Request) -> dict[str, Any]:
        """The verdict of the diagnosis, in plain words, with its figures."""
        body, row = await self._asked(MeasureBody, request)
        check_count("n", body.n, self.service.limits.draws)
        limit, seed = self.service.limits.draws, body.seed or 0
        found = await self.service.run(
            request, lambda: self.service.posterior.diagnose(row, body.n, limit=limit, seed=seed)
        )
        figures = finite(found.to_dict())
        verdict = judged([figures])
        return {
            "kind": verdict.kind,
            "headline": verdict.headline,
            "detail": verdict.detail,
            "figures": figures,
        }

    async def _asked(self, kind: type[Asked], request: Request) -> tuple[Asked, Row]:
        body = await self.service.body(kind, request)
        row = row_of(body, self.service.posterior)
        for name, value in row.items():
            if not isinstance(value, str) or len(value) > TEXT:
                raise RequestError(400, f"{name} must be a text of at most {TEXT:,} characters", param=name)
        return body, row

    def _is_enumerable(self) -> bool:
        posterior = self.service.posterior
        return posterior.target is not None and posterior.policy.support.size() <= self.service.limits.draws


class Workshop(Playground):
    """A playground that also builds posteriors of a language model, and trains samplers for them."""

    def __init__(self, service: Service, lm: LanguageModel):
        super().__init__(service)
        self.lm, self.setup, self.is_trained = lm, Setup(), False
        self.training: Training | None = None

    def state(self) -> dict[str, Any]:
        own = {"setup": self.setup.model_dump(), "trained": self.is_trained}
        return {**super().state(), **own, "training": self.training is not None}

    async def build(self, request: Request) -> dict[str, Any]:
        """Another kind of posterior, with a sampler that is not trained."""
        setup = await self.service.body(Setup, request)
        self._refuse_while_training()
        await self.service.run(request, lambda: self._put(setup.posterior(self.lm), setup, is_trained=False))
        return self.state()

    async def train(self, request: Request) -> Response:
        """A stream of events: progress, then the state, or an error. Who leaves the stream ends the training."""
        body, row = await self._asked(TrainBody, request)
        self._refuse_while_training()
        post, training = Post(), Training(self.lm, row, body.updates, body.seed or 0)
        work = Background(lambda: self._trained(training, work, post))
        self.training = training
        work.future.add_done_callback(lambda _: self._end(training))
        try:
            self.service.submit(work)
        except BaseException:
            work.drop()
            raise
        return EventStream(post.events(work), work, SECONDS)

    async def stop(self, request: Request) -> dict[str, Any]:
        """End the training after its current update; what it has learned is kept."""
        await self.service.body(Nothing, request)
        if self.training is not None:
            self.training.stop = True
        return {"training": self.training is not None}

    def _trained(self, training: Training, work: Work, post: Post) -> dict[str, Any]:
        def tell(event: dict[str, Any]) -> None:
            training.stop |= work.gone or self.service.ending
            post.put(event)

        posterior = training.run(self.service.posterior, tell)
        self._put(posterior, self.setup, is_trained=True)
        self._end(training)
        return {"done": True, "stopped": training.stop, "state": self.state()}

    def _put(self, posterior: Posterior, setup: Setup, *, is_trained: bool) -> None:
        """On the model thread."""
        self.service.posterior, self.setup, self.is_trained = posterior, setup, is_trained

    def _end(self, training: Training) -> None:
        if self.training is training:
            self.training = None

    def _refuse_while_training(self) -> None:
        if self.training is not None:
            raise RequestError(409, "a training runs: stop it, or wait for its end", code="training")


def _column(draw: Callable[[], Samples]) -> dict[str, Any]:
    """Samples and how they were drawn; or why there are none, which is no reason against the other columns."""
    try:
        samples = draw()
    except AmortLMError as e:
        return request_error(e).to_dict()
    shown = [
        {"text": s.text, "log_q": s.log_q, "log_reward": s.log_reward, "weight": s.weight} for s in samples
    ]
    return {"samples": shown, **samples.summary()}


def _page() -> APIRouter:
    """The page itself holds no data and needs no key; it asks for one."""
    router, text = APIRouter(), PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    @router.get("/")
    async def page() -> Response:
        return Response(text, 200, headers, "text/html; charset=utf-8")

    return router


def _policy(page: str) -> str:
    """A content security policy: the page's own style and script, by hash, and requests to this server; no more."""
    style, script = (
        " ".join(f"'{_sha256(part)}'" for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("style", "script")
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _routes(play: Playground) -> APIRouter:
    router = APIRouter(prefix="/play")

    @router.get("")
    async def state() -> Response:
        return json_response(play.state())

    @router.post("/sample")
    async def sample(request: Request) -> Response:
        return json_response(await play.sample(request))

    @router.post("/table")
    async def table(request: Request) -> Response:
        return json_response(await play.table(request))

    @router.post("/measure")
    async def measure(request: Request) -> Response:
        return json_response(await play.measure(request))

    return router


def _building(play: Workshop) -> APIRouter:
    router = APIRouter(prefix="/play")

    @router.post("/build")
    async def build(request: Request) -> Response:
        return json_response(await play.build(request))

    @router.post("/train")
    async def train(request: Request) -> Response:
        return await play.train(request)

    @router.post("/stop")
    async def stop(request: Request) -> Response:
        return json_response(await play.stop(request))

    return router
