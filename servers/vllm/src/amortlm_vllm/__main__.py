"""python -m amortlm_vllm MODEL: vLLM as a server of completions, for amortlm's HTTPSampler (docs/scale.md)."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import uvicorn
import vllm
from starlette.middleware.trustedhost import TrustedHostMiddleware
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import supports_lora
from vllm.v1.engine.async_llm import AsyncLLM

from amortlm_vllm import server
from amortlm_vllm.processor import FOLDER, SupportProcessor
from amortlm_vllm.weights import ADAPTER, MERGED, Adapters, Merged

# What the law of a support needs.
OURS = {
    "logits_processors": [SupportProcessor],
    "logprobs_mode": "processed_logits",  # `law.as_logits`
    "max_logprobs": 2,
    "async_scheduling": False,  # the processor needs the tokens written so far
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # nothing of the model's own
}
BY_FORM = ("enable_lora", "max_loras", "max_cpu_loras", "worker_extension_cls")  # what --weights decides


def main() -> None:
    given = _parser().parse_args()
    key = os.environ.get(server.KEY)
    if not key and not _is_loopback(given.host):
        sys.exit(
            f"whoever reaches {given.host} could use the server: set a key in {server.KEY}, or leave out --host"
        )
    # uvicorn ends with the signal that ended it, which would leave vLLM's processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its logits processors are of another kind
    # The address is taken before the model is loaded, which may take minutes.
    with _listening(given) as taken, tempfile.TemporaryDirectory(prefix="amortlm_vllm-") as folder:
        os.environ[FOLDER] = folder
        asyncio.run(_serve(given, taken, Path(folder), key))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m amortlm_vllm", description=__doc__)
    parser.add_argument("model", help="a hub name or a folder: the frozen model that the policy was made of")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--dtype", default="auto", help="float32: the same draws whatever else is in the batch"
    )
    parser.add_argument("--max-model-len", type=int, help="tokens of a prompt with its completion and stop")
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument(
        "--weights",
        choices=("auto", ADAPTER, MERGED),
        default="auto",
        help="what policies send: LoRA adapters, or whole weights with any adapter merged in; auto: adapters, if vLLM "
        "has LoRA for the model",
    )
    parser.add_argument(
        "--untied",
        action="store_true",
        help="merged weights whose head differs from the embeddings, of a model in which they are one tensor",
    )
    parser.add_argument("--keep", type=int, default=2, help="versions of the weights at a time")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation: starts faster")
    parser.add_argument(
        "--engine",
        type=_mapping,
        default={},
        metavar="JSON",
        help="other arguments of vLLM's AsyncEngineArgs",
    )
    return parser


def _mapping(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping")
    if taken := sorted(found.keys() & {*OURS, *BY_FORM}):
        raise argparse.ArgumentTypeError(f"{taken[0]} is set by the server")
    return found


def _arguments(given: argparse.Namespace) -> AsyncEngineArgs:
    passed = ("model", "dtype", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization")
    settings = {name: getattr(given, name) for name in (*passed, "enforce_eager")}
    if given.untied:  # vLLM would look for a head in the model's files, and whatever it reads is replaced
        settings |= {"hf_overrides": {"tie_word_embeddings": False}, "load_format": "dummy"}
    settings |= {**given.engine, **OURS}
    if given.weights == "auto":
        given.weights = ADAPTER if _has_lora(AsyncEngineArgs(**settings)) else MERGED
    if given.weights == MERGED:
        return AsyncEngineArgs(**settings, worker_extension_cls="amortlm_vllm.worker.Loading")
    if given.untied:
        sys.exit("--untied is for merged weights: add --weights merged")
    lora = {"max_lora_rank": given.max_lora_rank, "max_loras": given.keep, "max_cpu_loras": given.keep}
    return AsyncEngineArgs(**settings, enable_lora=True, **lora)


def _has_lora(arguments: AsyncEngineArgs) -> bool:
    """Can vLLM put adapters into the model?"""
    config = arguments.create_model_config()
    return supports_lora(config.registry.resolve_model_cls(config.architectures, config)[0])


def _listening(given: argparse.Namespace) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in given.host else socket.AF_INET
        return socket.create_server((given.host, given.port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        sys.exit(f"cannot listen on {given.host}, port {given.port} ({e}): give another --host or --port")


async def _serve(given: argparse.Namespace, taken: socket.socket, folder: Path, key: str | None) -> None:
    engine = AsyncLLM.from_engine_args(_arguments(given))
    try:
        kind = Merged if given.weights == MERGED else Adapters
        service = server.Service(engine, folder, kind(engine, folder, given.keep))
        app = server.create_app(service, _about(engine), key)
        if not key:  # a foreign page must not reach the server under a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", given.host])
        where = f"[{given.host}]" if ":" in given.host else given.host
        print(
            f"serving {given.model} at http://{where}:{taken.getsockname()[1]} (Ctrl-C ends it)",
            file=sys.stderr,
        )
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        await uvicorn.Server(config).serve(sockets=[taken])
    finally:
        engine.shutdown()


def _about(engine: AsyncLLM) -> dict[str, Any]:
    config = engine.model_config
    return {
        "model": Path(config.model).name,
        "dtype": str(config.dtype).removeprefix("torch."),
        "vocab_size": config.get_vocab_size(),
        "max_model_len": config.max_model_len,
        "block_size": engine.vllm_config.cache_config.block_size,
        "tied": bool(getattr(config.hf_text_config, "tie_word_embeddings", False)),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
