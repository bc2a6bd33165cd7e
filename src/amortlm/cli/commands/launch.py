"""amortlm launch: servers of completions, and a training that draws from them."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace

from amortlm.cli.commands import train
from amortlm.engine.adapter import FULL
from amortlm.errors import ConfigError
from amortlm.rollout.launch import Program, servable, servers, servers_on_ray

TO_COME = "http://127.0.0.1"  # stands for the servers until they have addresses


def run(args: Namespace) -> None:
    if args.servers < 1:
        raise ConfigError(f"--servers {args.servers}: give at least one, or use amortlm train")
    spec = train.spec_of(args, rollout=TO_COME)
    with servable(spec.model) as model:
        # What is given counts more: the last of equal options does.
        own = ["--weights", "merged"] if spec.adapter == FULL else []
        program = Program(args.python, model, [*own, *shlex.split(args.server_options)])
        started = (
            servers(program, args.servers)
            if args.ray is None
            else servers_on_ray(program, args.servers, args.ray)
        )
        with started as urls:
            print("completions from", *urls, file=sys.stderr)
            train.train(args, spec.with_overrides(config={"rollout": urls}))
