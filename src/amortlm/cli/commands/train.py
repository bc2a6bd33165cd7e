"""amortlm train: train a sampler."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from typing import Any

from amortlm.cli.checks import check_folder
from amortlm.cli.status import run_folder
from amortlm.settings import named_texts
from amortlm.train.plan import Plan, plan
from amortlm.train.run import refuse_used
from amortlm.train.spec import RunSpec, settings_from_text


def run(args: Namespace) -> None:
    spec = spec_of(args)
    if args.plan:
        _show(plan(spec, None if args.plan == "here" else args.plan))
    else:
        train(args, spec)


def _show(found: Plan) -> None:
    from tabulate import tabulate

    print(found)
    headers = ["GiB on each device, with", *(f"{n} device{'s' * (n > 1)}" for n in found.devices)]
    print(tabulate(found.rows(), headers=headers, floatfmt=".3f"))


def train(args: Namespace, spec: RunSpec) -> None:
    """Train what `spec` states, into the folder that the options name."""
    output = run_folder(args)
    check_folder(output)
    if not (args.resume or args.overwrite):
        refuse_used(output)  # before a model is loaded
    trainer = spec.trainer(str(output))
    if sys.stderr.isatty():
        print(*(f"chosen: {sentence}" for sentence in trainer.chosen), sep="\n", file=sys.stderr)
    trainer.train(resume_from_checkpoint=args.resume, overwrite_output_dir=args.overwrite)
    if trainer.is_world_process_zero():
        rows = output / "rows.jsonl"
        rows.write_text("".join(json.dumps(row, default=str) + "\n" for row in spec.rows()), encoding="utf-8")
        print(f"saved {output}")
        print(f"try:  {shlex.join(['amortlm', 'sample', str(output), *spec.trust_options()])}")


def spec_of(args: Namespace, **config: Any) -> RunSpec:
    """The run that the options describe. config: settings beside those of --set."""
    from amortlm.lab.tasks import load_task

    settings = {**settings_from_text(named_texts(args.set, "--set")), **config}
    own = {"model": args.model, "data": args.data, "config": settings, "trust": args.trust}
    if args.spec.endswith((".yaml", ".yml")):
        return RunSpec.from_yaml(args.spec, **own)
    spec: RunSpec = load_task(args.spec).SPEC
    return spec.with_overrides(**own)
