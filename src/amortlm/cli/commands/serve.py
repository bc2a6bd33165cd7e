"""amortlm serve: a saved posterior over HTTP."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.cli.loading import posterior_of
from amortlm.diagnostics import certificate

if TYPE_CHECKING:
    from fastapi import FastAPI


def run(args: Namespace) -> None:
    from amortlm.serve import create_app

    def create(settings: dict[str, Any]) -> FastAPI:
        posterior = posterior_of(args)
        if args.rollout:
            from amortlm.rollout import HTTPSampler

            posterior.policy.sampler = HTTPSampler(args.rollout, posterior.policy)
        return create_app(posterior, **settings)

    serving(args, args.folder, create)


def serving(args: Namespace, what: str, create: Callable[[dict[str, Any]], FastAPI]) -> None:
    """Serve what `create` makes of the settings of an application."""
    from amortlm.serve import Limits, serve

    limits = Limits(args.max_n, args.max_draws, args.max_body, args.max_queue, args.timeout)
    folder = Path(what)
    known = args.folder is not None and (folder / certificate.FILE).exists()
    name = args.name or folder.resolve().name
    settings = {
        "name": name,
        "certificate": certificate.Certificate.load(folder) if known else None,
        "limits": limits,
    }
    serve(lambda: create(settings), name=name, limits=limits, host=args.host, port=args.port)
