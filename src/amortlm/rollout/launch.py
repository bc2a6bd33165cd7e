"""Servers of completions as processes: of this machine, or of the machines of a Ray cluster (`amortlm launch`)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from amortlm.engine import gguf
from amortlm.errors import ConfigError, RolloutError
from amortlm.language_model import EMBEDDED, EMBEDDED_PATH, LanguageModel
from amortlm.rollout.connection import KEY

STARTING = 1800.0  # seconds: a large model is read slowly
ENDING = 30.0
REMEDY = "give --python the interpreter of an environment with vLLM and servers/vllm, as docs/scale.md says"
SERVING = re.compile(r"^serving .* at (http://\S+)")


@dataclass(frozen=True)
class Program:
    """What starts a server. python: the interpreter of the environment that has vLLM and servers/vllm; options: of
    `python -m amortlm_vllm`."""

    python: str
    model: str
    options: Sequence[str] = ()

    def command(self, host: str = "127.0.0.1") -> list[str]:
        """With a free port."""
        own = ["--host", host, "--port", "0"]
        return [self.python, "-m", "amortlm_vllm", self.model, *own, *self.options]


class ServerProcess:
    """A server that was started here. Raises RolloutError if the program cannot be started."""

    def __init__(self, program: Program, host: str = "127.0.0.1"):
        try:
            self._process = subprocess.Popen(
                program.command(host),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as e:
            raise RolloutError(f"{program.python} cannot be started ({e.strerror}): {REMEDY}") from e
        self._said: deque[str] = deque(maxlen=5)
        self._url: str | None = None
        self._known = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def url(self) -> str:
        """Its address, once it serves. Raises RolloutError with its last words if it ends before, or takes too long."""
        in_time = self._known.wait(STARTING)
        if self._url is None:
            self.stop()
            last = " / ".join(self._said) or "it said nothing"
            what = "has ended" if in_time else f"does not serve after {STARTING:g} s"
            raise RolloutError(f"the server {what} ({last}): {REMEDY}")
        return self._url

    def stop(self) -> None:
        _end(self._process)

    def _read(self) -> None:
        """What it says, to its end: a full pipe would stop it."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.strip())
            if found := SERVING.match(line):
                self._url = found[1]
                self._known.set()
        self._known.set()


@contextlib.contextmanager
def servers(program: Program, count: int) -> Iterator[list[str]]:
    """The addresses of servers on this machine, which end with the block. Raises RolloutError."""
    started: list[ServerProcess] = []
    try:
        started += [ServerProcess(program) for _ in range(count)]
        yield [server.url() for server in started]
    finally:
        for server in started:
            server.stop()


@contextlib.contextmanager
def servers_on_ray(program: Program, count: int, address: str) -> Iterator[list[str]]:
    """As `servers`, on the machines of a Ray cluster, spread over them, with a GPU each where the cluster has some.

    address: of the cluster, or "local" for one that lives on this machine as long as the block. The program and the
    model must be at the same paths there. Without AMORTLM_API_KEY the servers get a key of their own. Raises
    ConfigError without Ray or without a cluster at the address, RolloutError.
    """
    ray = _ray(address)
    own_key = KEY not in os.environ
    key = os.environ.setdefault(KEY, secrets.token_urlsafe())
    try:
        per_server = ray.cluster_resources().get("GPU", 0) > 0
        place = {"num_gpus": int(per_server), "num_cpus": 1, "scheduling_strategy": "SPREAD"}
        environment = {"env_vars": {KEY: key}}
        actor = ray.remote(**place)(_Actor)
        actors = [actor.options(runtime_env=environment).remote(program) for _ in range(count)]
        try:
            yield ray.get([one.url.remote() for one in actors])
        except ray.exceptions.RayTaskError as e:
            raise RolloutError(str(e.cause)) from e
        finally:
            ray.wait([one.stop.remote() for one in actors], num_returns=count, timeout=ENDING)
    finally:
        ray.shutdown()
        if own_key:
            os.environ.pop(KEY, None)


class _Actor:
    """A server on a machine of a Ray cluster."""

    def __init__(self, program: Program):
        import ray

        self._server = ServerProcess(program, ray.util.get_node_ip_address())

    def url(self) -> str:
        return self._server.url()

    def stop(self) -> None:
        self._server.stop()


def _ray(address: str) -> Any:
    """Ray, connected."""
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install 'amortlm[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise ConfigError(f"no Ray cluster at {address!r} ({e}): give the address of one, or local") from e
    return ray


@contextlib.contextmanager
def servable(model: str) -> Iterator[str]:
    """The model as a folder or hub name that vLLM can load: a GGUF file is dequantised into a folder that lives as long
    as the block. Raises ConfigError, ModelError for a file that cannot be read."""
    if model == EMBEDDED:
        yield str(EMBEDDED_PATH)
    elif not model.endswith(gguf.SUFFIX):
        yield model
    else:
        with tempfile.TemporaryDirectory(prefix="amortlm-") as folder:
            lm = LanguageModel.from_pretrained(model, self_check=False)
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            yield folder


def run(command: Sequence[str]) -> int:
    """Run a server until it ends, or the block is left by a signal. Returns its exit status."""
    try:
        process = subprocess.Popen(list(command))
    except OSError as e:
        raise RolloutError(f"{command[0]} cannot be started ({e.strerror}): {REMEDY}") from e
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """Answers that are under way may take their time, but not for ever."""
    process.terminate()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
