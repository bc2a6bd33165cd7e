"""amortlm train: train a sampler."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace

from amortlm.cli.checks import check_folder
from amortlm.cli.status import run_folder
from amortlm.settings import named_texts
from amortlm.train.plan import DEVICES, Plan, plan
from amortlm.train.run import refuse_used
from amortlm.train.spec import RunSpec, settings_from_text


def run(args: Namespace) -> None:
    spec = spec_of(args)
    if wanted := getattr(args, "plan", None):
        _show(plan(spec, None if wanted == "here" else wanted))
    else:
        _train(args, spec)


def _show(found: Plan) -> None:
    from tabulate import tabulate

    print(found)
    headers = ["GiB on each device, with", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES)]
    print(tabulate(found.rows(), headers=headers, floatfmt=".3f"))


def _train(args: Namespace, spec: RunSpec) -> None:
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


def spec_of(args: Namespace) -> RunSpec:
    """The run that the options describe."""
    from amortlm.lab.tasks import load_task

    is_file = args.spec.endswith((".yaml", ".yml"))
    spec: RunSpec = RunSpec.from_yaml(args.spec) if is_file else load_task(args.spec).SPEC
    config = settings_from_text(named_texts(args.set, "--set"))
    return spec.with_overrides(model=args.model, data=args.data, config=config, trust=args.trust)
