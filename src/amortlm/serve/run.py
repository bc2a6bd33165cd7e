"""The server of `amortlm serve`: uvicorn on a socket of its own."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

from starlette.middleware.trustedhost import TrustedHostMiddleware

from amortlm.errors import ConfigError, MissingExtraError
from amortlm.serve.app import KEY, Service
from amortlm.serve.limits import Limits

try:
    import uvicorn
    from fastapi import FastAPI
except ImportError as e:
    raise MissingExtraError("a service needs fastapi and uvicorn: pip install 'amortlm[serve]'") from e

HERE = ["127.0.0.1", "localhost"]  # how a client on this machine names the server


def serve(
    load: Callable[[], FastAPI],
    *,
    name: str,
    limits: Limits,
    host: str,
    port: int,
) -> None:
    """Serve an application until a signal ends it. It is loaded once the address is taken.

    Raises ConfigError for an address that other machines can reach if there is no key, and for one that cannot be
    listened on.
    """
    has_key = bool(os.environ.get(KEY))
    if not has_key and not is_loopback(host):
        raise ConfigError(
            f"whoever reaches {host} could use the server: set a key in the environment variable {KEY}, or leave out "
            "--host to listen on this machine only"
        )
    with _listening(host, port) as taken:
        app = load()
        if not has_key:  # a foreign page must not reach the server under a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*HERE, host])
        where = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{where}:{taken.getsockname()[1]} (Ctrl-C ends it)", file=sys.stderr)
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=int(limits.seconds) + 1
        )
        _Server(config, app.state.service).run(sockets=[taken])


class _Server(uvicorn.Server):
    """Tells the service of a signal: a training, whose connection this server would wait for, then ends."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.ending = True
        super().handle_exit(sig, frame)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({e}): give another --host or --port"
        ) from None
