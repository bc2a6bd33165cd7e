"""The commands of `amortlm`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import card, hub
from amortlm.cli.quick import check_file
from amortlm.cli.status import exit_status, run_folder
from amortlm.data import check_rows, load_rows
from amortlm.diagnostics import certificate
from amortlm.diagnostics.diagnose import LEVEL, Gold
from amortlm.environment import environment
from amortlm.errors import CheckpointError, ConfigError, DataError, TrainingError
from amortlm.inference.correct import check_method
from amortlm.language_model import LanguageModel
from amortlm.policy.laws import examine_policy, examine_sampling
from amortlm.posterior import Posterior, Samples
from amortlm.report import is_measured, measure, write_report
from amortlm.settings import named_texts
from amortlm.train.run import refuse_used
from amortlm.train.spec import RunSpec, settings_from_text
from amortlm.types import Row, finite

if TYPE_CHECKING:
    from fastapi import FastAPI

hf_logging.disable_progress_bar()
TEXT_WIDTH = 60
# Versions that `doctor` names, of what is installed.
DOCTOR = (
    *("amortlm", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface_hub", "numpy", "gguf", "trl", "genlm-control"),
)


def train(args: Namespace) -> None:
    from amortlm.lab.tasks import load_task

    output = run_folder(args)
    _check_folder(output)
    is_file = args.spec.endswith((".yaml", ".yml"))
    spec: RunSpec = RunSpec.from_yaml(args.spec) if is_file else load_task(args.spec).SPEC
    config = settings_from_text(named_texts(args.set, "--set"))
    spec = spec.with_overrides(model=args.model, data=args.data, config=config, trust=args.trust)
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


def sample(args: Namespace) -> None:
    _check_counts(("-n", args.n), ("--budget", args.budget))
    check_method(args.correct)
    if args.budget is not None and args.correct == "none":
        raise ConfigError("--budget is for corrected samples: also give --correct sir, smc or mh")
    posterior, rows = _load(args)
    for row in rows[: None if args.data else 1]:
        samples = posterior.sample(row, args.n, correct=args.correct, budget=args.budget, seed=args.seed)
        summary = {} if samples.method == "none" else {"correction": samples.summary()}
        if args.json:
            for s in samples:
                print(json.dumps(finite({"row": dict(row), **s.to_dict(), **summary})))
            continue
        _print_row(row)
        table = [[_wrap(s.text), s.log_q, s.log_reward, s.weight] for s in samples]
        headers = ["completion", "log q", "log R", "weight"]
        print(tabulate(table, headers=headers, floatfmt=".3f", disable_numparse=[0]))  # " 25." is text
        if summary:
            print(_how(samples))
        print()


def _how(samples: Samples) -> str:
    """One line on how corrected samples were drawn."""
    if samples.method == "mh":
        return f"mh: {samples.draws} draws, acceptance rate {samples.acceptance_rate:.2f}"
    return f"{samples.method}: {samples.draws} draws, ESS {samples.ess:.1f}, log Z {samples.log_z:.3f}"


def evaluate(args: Namespace) -> int:
    _check_counts(("-n", args.n), ("--rows", args.rows))
    level = LEVEL if args.level is None else args.level
    if not 0 < level < 1:
        raise ConfigError(f"--level must lie between 0 and 1, got {level:g}")
    if args.output:
        check_file(args.output)
    if args.card and not Path(args.folder).is_dir():
        raise ConfigError(
            f"--card writes into a folder, and {args.folder} is none here: evaluate the folder, then push"
        )
    if args.check:
        return _check(args)
    posterior, rows = _load(args)
    rows = rows[: args.rows]
    diagnosis = posterior.diagnose(rows, args.n, seed=args.seed, level=level, gold=_gold(rows, args.gold))
    print(diagnosis)
    if args.output:
        text = json.dumps(finite([row.to_dict() for row in diagnosis.rows]), indent=2) + "\n"
        Path(args.output).write_text(text, encoding="utf-8")
        print(f"wrote {args.output}")
    if args.card:
        posterior.save_card(args.folder, rows, diagnosis)
        print(f"wrote {Path(args.folder) / card.FILE}")
    return 0


def _check(args: Namespace) -> int:
    _locate(args)
    folder = Path(args.folder)
    if (folder / "posterior.json").exists() and not (folder / certificate.FILE).exists():
        raise CheckpointError(
            f"{folder} has no certificate to check: training with --set stop_at_gap=0.05 (in YAML: config: "
            "{stop_at_gap: 0.05}) saves one when it reaches that gap"
        )
    known = args.data or args.column or (folder / "rows.jsonl").exists()
    posterior = _posterior(args)
    found = certificate.check(
        posterior.policy,
        posterior.target,
        certificate.Certificate.load(folder),
        seed=args.seed,
        data_hash=certificate.hash_rows(_rows(args)) if known else None,
        adapter_hash=certificate.hash_adapter(folder),
    )
    print(found.line if found.holds else f"amortlm: {found.line}", file=None if found.holds else sys.stderr)
    return 0 if found.holds else 1


def report(args: Namespace) -> None:
    _check_counts(("-n", args.n))
    if args.output:
        check_file(args.output)
    for folder in () if args.quick else args.folders:
        if (Path(folder) / "posterior.json").exists() and not is_measured(folder, args.n, args.seed):
            posterior = Posterior.from_pretrained(folder, lm=args.model, trust=args.trust)
            measure(posterior, folder, args.n, seed=args.seed)
    print(f"wrote {write_report(args.folders, args.output)}")


def push(args: Namespace) -> None:
    url = hub.push(
        args.folder,
        args.repo,
        private=args.private or None,
        commit_message=args.message,
        allow_local_model=args.allow_local_model,
    )
    print(f"pushed to {url}")


def table(args: Namespace) -> None:
    _check_counts(("-n", args.n), ("--top", args.top), ("--limit", args.limit))
    posterior, rows = _load(args)
    for row in rows[: None if args.data else 1]:
        found = posterior.table(row, args.n, limit=args.limit, top=args.top, seed=args.seed)
        if args.json:
            print(json.dumps(finite({"row": dict(row), **found.to_dict()})))
        else:
            _print_row(row)
            print(f"{found}\n")


def _print_row(row: Row) -> None:
    for name, value in row.items():
        print(textwrap.fill(f"{name}: {value}", 100, subsequent_indent="   "))


def serve(args: Namespace) -> None:
    from amortlm.serve import create_app

    _serve(args, args.folder, lambda settings: create_app(_posterior(args), **settings))


def play(args: Namespace) -> None:
    from amortlm.serve import create_play

    if args.folder is None:
        model = args.model or "embedded"
        _serve(args, model, lambda settings: create_play(LanguageModel.from_pretrained(model), **settings))
    else:
        _serve(args, args.folder, lambda settings: create_play(_posterior(args), **settings))


def _serve(args: Namespace, what: str, create: Callable[[dict[str, Any]], FastAPI]) -> None:
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


def doctor(args: Namespace) -> int:
    lm = LanguageModel.from_pretrained(args.model)
    found = lm.exactness
    law = examine_sampling(lm)
    found = replace(found, findings=(*found.findings, *examine_policy(lm), *law.findings))
    place = {
        **environment(DOCTOR),
        "device": str(lm.model.device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
    }
    if args.json:
        told = {
            **found.to_dict(),
            **place,
            "law": {"holds": law.holds, "error": law.error, "draws": law.draws},
        }
        print(json.dumps(finite(told)))
    else:
        print(f"Python {place['python']};", ", ".join(f"{name} {v}" for name, v in place["packages"].items()))
        print(
            f"{place['cpu']}, {place['cores']} cores, {place['threads']} threads; {place['gpu'] or 'no GPU'}"
        )
        print(f"{args.model}: {place['device']}, {place['dtype']}\n\n{found}\n{law}")
    return 0 if law.holds else 1


def _gold(rows: Sequence[Row], column: str | None) -> Gold | None:
    if column is None:
        return None
    check_rows(rows, {column}, "--gold", why="")
    return [[str(row[column])] for row in rows]


def reproduce(args: Namespace) -> None:
    from amortlm.lab import command
    from amortlm.lab.experiments import load_experiment

    experiment = load_experiment(args.experiment)
    _check_counts(("--jobs", args.jobs), ("--seeds", args.seeds))
    _check_folder(command.output_of(experiment, args))
    helpers: list[SpawnProcess] = []
    command.perform(experiment, args, args.command_line, lambda plan: processes(args, plan.left(), helpers))
    failed = [helper.exitcode for helper in helpers if helper.exitcode]
    if failed:
        raise TrainingError(
            f"a process of --jobs ended with exit status {failed[0]}; the same command runs the missing runs"
        )


@contextmanager
def processes(args: Namespace, runs: int, helpers: list[SpawnProcess]) -> Iterator[int]:
    """Start helper processes for the same runs in the same folder (`Store.taken`); yields their number.

    Without --jobs there are none. At the end this process waits for them. An error here ends them; their checkpoints
    stay.
    """
    count = 0 if args.is_helper else min(args.jobs, runs) - 1
    if count < 1:
        yield 0
        return
    threads = torch.get_num_threads()
    share = max(1, threads // args.jobs)
    helper = Namespace(**{**vars(args), "is_helper": True})
    helpers += [get_context("spawn").Process(target=_help, args=(helper, share)) for _ in range(count)]
    torch.set_num_threads(share)
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that helpers do not outlive this process
    try:
        for each in helpers:
            each.start()
        yield count
    except BaseException:
        for each in helpers:
            if each.pid is not None:
                each.terminate()
        raise
    finally:
        for each in helpers:
            if each.pid is not None:
                each.join()
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(threads)


def _help(args: Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    sys.exit(exit_status(lambda: reproduce(args), args))


def _load(args: Namespace) -> tuple[Posterior, Sequence[Row]]:
    """The posterior and its rows. Rows of --column and --data are read first, because loading a model takes long."""
    given = _rows(args) if args.column or args.data else None
    return _posterior(args), given or _rows(args)


def _posterior(args: Namespace) -> Posterior:
    _locate(args)
    return Posterior.from_pretrained(args.folder, lm=args.model, trust=args.trust)


def _locate(args: Namespace) -> None:
    """Replace a name on the hub by the folder of its download."""
    args.folder, args.revision = str(hub.locate(args.folder, args.revision)), None


def _rows(args: Namespace) -> Sequence[Row]:
    """--column, --data, or the rows that the posterior was trained on."""
    if args.column:
        return [named_texts(args.column, "--column")]
    if args.data:
        return load_rows(args.data)
    saved = Path(args.folder) / "rows.jsonl"
    if not saved.exists():
        raise DataError("no rows are given: give --column NAME=TEXT (once per column) or --data FILE")
    return load_rows(saved)


def _check_counts(*options: tuple[str, int | None]) -> None:
    for name, value in options:
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def _check_folder(name: str | Path) -> None:
    """Raise ConfigError for an output folder that cannot be created or written, before any work is done."""
    folder = next(path for path in (Path(name), *Path(name).parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written" if folder.is_dir() else "is a file"
        raise ConfigError(f"cannot write to the folder {name}: {folder} {why}; give another --output")


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, TEXT_WIDTH))
