"""The HTTP server: vLLM's engine behind the four routes that amortlm's `HTTPSampler` calls (docs/scale.md)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from safetensors.torch import save
from torch import Tensor
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from amortlm_vllm.law import Law, from_logits
from amortlm_vllm.processor import ARGUMENT
from amortlm_vllm.refusals import RefusalError
from amortlm_vllm.weights import Adapters, Merged

KEY = "AMORTLM_API_KEY"
DAMAGED = "the name is not the hash of the bytes: they were damaged on their way"
SUPPORTS = 256  # tables kept; of a run, there are a few


class Service:
    """What the server keeps: supports and weights, by the hash of their bytes, in files that vLLM's processes read."""

    def __init__(self, engine: AsyncLLM, folder: Path, weights: Adapters | Merged):
        self.engine, self.folder, self.weights = engine, folder, weights
        self.laws: OrderedDict[str, Law] = OrderedDict()

    def put_support(self, name: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != name:
            raise RefusalError(400, DAMAGED)
        try:
            law = Law.from_bytes(data)
        except ValueError as e:
            raise RefusalError(400, str(e)) from e
        size = self.engine.model_config.get_vocab_size()
        if len(law.allowed) != size:
            raise RefusalError(400, f"a support of {len(law.allowed)} tokens for a model of {size}")
        _write(self.folder / f"{name}.safetensors", data)
        self.laws[name] = law
        while len(self.laws) > SUPPORTS:
            self.laws.popitem(last=False)

    async def put_weights(self, name: str, pieces: AsyncIterable[bytes]) -> None:
        """Weights are large: they go to a file as they come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part, found = self.folder / f"{uuid.uuid4().hex}.part", hashlib.sha256()
        try:
            with part.open("wb") as file:
                async for piece in pieces:
                    found.update(piece)
                    file.write(piece)
            if found.hexdigest() != name:
                raise RefusalError(400, DAMAGED)
            await self.weights.put(name, part)
        finally:
            part.unlink(missing_ok=True)

    async def draw(self, body: dict[str, Any]) -> bytes:
        """The completions that a request asks for, as safetensors."""
        law, name = self.laws.get(body["support"]), body["weights"]
        if law is None or name not in self.weights:
            raise RefusalError(
                410, f"the server does not know {'this support' if law is None else 'these weights'}"
            )
        self.laws.move_to_end(body["support"])
        counts, length = body["counts"], law.max_tokens + 1
        streams = _streams(body["seeds"], counts, length)
        prompts = [p for p, n in zip(body["prompts"], counts, strict=True) for _ in range(n)]
        heats = body["temperature"] or [1.0] * len(prompts)
        kept = body["kept"] or [[]] * len(prompts)
        size, room = len(law.allowed), self.engine.model_config.max_model_len
        if not all(len(z) <= law.max_tokens and all(0 <= token < size for token in z) for z in kept):
            raise RefusalError(
                400, "kept tokens that are not of the model, or more than a completion may have"
            )
        if (longest := max(map(len, prompts), default=0) + length) > room:
            raise RefusalError(
                400,
                f"a prompt with its completion has {longest} tokens, and the server room for {room}: start it with a "
                "higher --max-model-len",
            )
        every = {"support": body["support"], "epsilon": body["epsilon"]}
        async with self.weights.using(name) as adapter:
            jobs = [
                self._complete(law, adapter, prompt, {**every, "kept": z, "uniforms": u, "heat": heat})
                for prompt, z, u, heat in zip(prompts, kept, streams.tolist(), heats, strict=True)
            ]
            return save(_gathered(law, await _all(jobs)))

    async def _complete(
        self, law: Law, adapter: LoRARequest | None, prompt: Sequence[int], own: dict[str, Any]
    ) -> tuple[list[int], int, list[tuple[float, float]]]:
        """(tokens, kept ones of them, what `from_logits` says of each drawn one and of the stop)."""
        kept = own["kept"]
        params = SamplingParams(
            temperature=0.0,  # the processor draws; vLLM takes what it says is likeliest
            max_tokens=law.max_tokens + 1 - len(kept),  # the stop is a token, too
            stop_token_ids=list(law.stop_ids),
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={ARGUMENT: own},
        )
        given = {"prompt_token_ids": [*prompt, *kept]}
        async for output in self.engine.generate(given, params, uuid.uuid4().hex, lora_request=adapter):
            done = output.outputs[0]
        logits = [{token: x.logprob for token, x in step.items()} for step in done.logprobs]
        said = [from_logits(token, step) for token, step in zip(done.token_ids, logits, strict=True)]
        if done.token_ids[-1] not in law.stop_ids:
            raise RuntimeError(f"vLLM ended a completion before its stop ({done.finish_reason})")
        return [*kept, *done.token_ids], len(kept), said


def create_app(service: Service, about: dict[str, Any], key: str | None) -> FastAPI:
    """The routes. key: needed by all except /health; about: what /info says."""
    app = FastAPI(title="amortlm_vllm", openapi_url=None)
    guard = [Depends(_guard(key))]

    @app.exception_handler(RefusalError)
    async def refuse(_: Request, error: RefusalError) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/health")
    async def health() -> Response:
        await service.engine.check_health()
        return JSONResponse({"status": "ok"})

    @app.get("/info", dependencies=guard)
    async def info() -> Response:
        return JSONResponse(about | {"weights": service.weights.form})

    @app.put("/supports/{name}", dependencies=guard)
    async def put_support(name: str, request: Request) -> Response:
        service.put_support(name, await request.body())
        return JSONResponse({})

    @app.put("/weights/{name}", dependencies=guard)
    async def put_weights(name: str, request: Request) -> Response:
        await service.put_weights(name, request.stream())
        return JSONResponse({})

    @app.post("/draw", dependencies=guard)
    async def draw(request: Request) -> Response:
        drawing = asyncio.ensure_future(service.draw(_body(await request.body())))
        while not (await asyncio.wait([drawing], timeout=1))[0]:
            if await request.is_disconnected():
                drawing.cancel()
        if drawing.cancelled():
            return Response(status_code=499)
        return Response(await drawing, media_type="application/octet-stream")

    return app


def _guard(key: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), (key or "").encode())
        if key is not None and not known:
            raise RefusalError(401, "give the key of this server: Authorization: Bearer KEY")

    return check


def _body(data: bytes) -> dict[str, Any]:
    """A request for completions. Raises RefusalError if it is none."""
    try:
        body = json.loads(data)
        counts, total = [int(n) for n in body["counts"]], sum(body["counts"])
        lists = [body[name] for name in ("temperature", "kept") if body[name] is not None]
        fits = len(body["prompts"]) == len(counts) == len(body["seeds"]) and all(
            len(x) == total for x in lists
        )
        fits &= (
            all(body["prompts"])
            and isinstance(body["epsilon"], float | int)
            and min(counts) >= 0
            and total > 0
        )
    except (ValueError, KeyError, TypeError) as e:
        raise RefusalError(400, f"not a request for completions ({type(e).__name__}: {e})") from e
    if not fits:
        raise RefusalError(400, "not a request for completions: its lists do not fit together")
    return body


def _streams(seeds: Sequence[int], counts: Sequence[int], length: int) -> Tensor:
    """[sum of counts, length] uniform numbers in [0, 1), from one generator per seed: those of amortlm."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(n, length, generator=s) for s, n in zip(streams, counts, strict=True)])


async def _all(jobs: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results of all; if one fails, or nobody waits any more, the others end, too."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _gathered(
    law: Law, found: Sequence[tuple[list[int], int, list[tuple[float, float]]]]
) -> dict[str, Tensor]:
    """The tensors of `amortlm.engine.decoding.Draws`."""
    lengths = torch.tensor([len(tokens) - 1 for tokens, _, _ in found])
    count, width = len(found), max(int(lengths.max()), 1)
    tokens = torch.zeros(count, width, dtype=torch.long)
    log_pf = torch.zeros(count, width)
    log_pterm = torch.full((count, width + 1), -torch.inf)
    for i, (written, kept, said) in enumerate(found):
        n = len(written) - 1
        tokens[i, :n] = torch.tensor(written[:-1], dtype=torch.long)
        log_p, log_stop = torch.tensor(said).unbind(1)
        log_pf[i, kept:n], log_pterm[i, kept : n + 1] = log_p[:-1], log_stop
    stops = torch.tensor([written[-1] for written, _, _ in found])
    return {"tokens": tokens, "lengths": lengths, "stops": stops, "log_pf": log_pf, "log_pterm": log_pterm}


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)
