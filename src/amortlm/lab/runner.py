"""Runs an experiment: every method and seed, each saved as it finishes (`amortlm.lab.store`). Several processes can
work in one folder: each takes the next run that nobody has."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from amortlm.environment import environment
from amortlm.errors import AmortLMError, ConfigError, nearest
from amortlm.lab.experiment import Context, Experiment, Results, Run, Settings
from amortlm.lab.overrides import with_overrides
from amortlm.lab.report import collect, progress_line, write_report
from amortlm.lab.store import Store, finite
from amortlm.language_model import LanguageModel

DEFAULT_SEEDS = {"smoke": 1}  # other presets: 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a command asks for, checked: experiment, settings, model, data, methods, number of seeds and folder."""

    experiment: Experiment
    settings: Settings
    model: str
    data: Path | None
    methods: list[str]
    seeds: int
    store: Store
    command: str

    def runs(self) -> list[tuple[str, int]]:
        """(method, seed): every method once before any second seed, so that an early end leaves all methods."""
        once = self.experiment.once
        return [(m, seed) for seed in range(self.seeds) for m in self.methods if not (seed and m in once)]

    def left(self) -> int:
        """How many runs are not finished. Raises ConfigError where the folder holds runs of other settings."""
        return len(set(self.runs()) - self.store.finished().keys())

    def context(self, dry_run: bool) -> Context:
        """Load the model and read the data. Raises ModelError, DataError, ConfigError."""
        if (
            self.model == self.settings["model"]
            and self.model.startswith("models/")
            and not Path(self.model).exists()
        ):
            raise ConfigError(
                f"this preset needs {self.model}: `make model` fetches it. Or give another by --model"
            )
        lm = LanguageModel.from_pretrained(self.model)
        data = self.experiment.prepare(self.settings, lm, self.data)
        return Context(self.settings, lm, data, dry_run)


def make_plan(
    experiment: Experiment,
    preset: str,
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    overrides: Mapping[str, str] | None = None,
    command: str = "",
) -> Plan:
    """methods: names, or patterns such as "sft-*". overrides: settings by name, as typed on the command line.

    Raises ConfigError for an unknown preset, method or setting, for data given to an experiment that reads none, and
    for fewer than one seed.
    """
    if preset not in experiment.presets:
        raise ConfigError(f"unknown preset {preset!r}; {nearest(preset, experiment.presets)}")
    settings = with_overrides(experiment.presets[preset], overrides or {}, experiment.groups)
    if data is not None and not experiment.reads_data:
        raise ConfigError(f"the experiment {experiment.name!r} reads no data; leave out --data")
    for pattern in methods or []:
        if not any(fnmatchcase(name, pattern) for name in experiment.methods):
            raise ConfigError(f"unknown method {pattern!r}; {nearest(pattern, experiment.methods)}")
    chosen = [m for m in experiment.methods if not methods or any(fnmatchcase(m, p) for p in methods)]
    seeds = DEFAULT_SEEDS.get(preset, 3) if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    model = model or settings["model"]
    identity = {
        "experiment": experiment.name,
        "preset": preset,
        "settings": settings,
        "model": model,
        "data": _fingerprint(data),
    }
    identity = json.loads(json.dumps(identity))  # as it will be read back
    return Plan(experiment, settings, model, data, chosen, seeds, Store(output, identity), command)


def _fingerprint(data: Path | None) -> str | None:
    """A path with a hash of the files under it. A path that does not exist is left for the experiment to refuse."""
    if data is None:
        return None
    digest = hashlib.sha256(data.name.encode())
    for file in sorted(p for p in [data, *data.rglob("*")] if p.is_file()):
        digest.update(file.relative_to(data).as_posix().encode() + file.read_bytes())
    return f"{data} (sha256 {digest.hexdigest()[:16]})"


def dry_run(plan: Plan, say: Say = print) -> None:
    """Build every method up to its first step, in a temporary folder."""
    context = plan.context(dry_run=True)
    for method in plan.methods:
        with tempfile.TemporaryDirectory() as folder, _naming(method):
            plan.experiment.methods[method](replace(context, folder=Path(folder)))
        say(f"{method}: ok")


def execute(plan: Plan, say: Say = print, processes: int = 0) -> Results:
    """Run what is not finished in the output folder, and return everything finished, as in results.json.

    A method that fails raises its AmortLMError: what is finished stays, and the same command goes on from there.
    Raises ConfigError where the folder holds runs of other settings. processes: how many work in the folder, to say
    what time is left (0: not said).
    """
    store, done = plan.store, plan.store.finished()
    todo = [run for run in plan.runs() if run not in done]
    if done:
        say(f"{len(plan.runs()) - len(todo)} of {len(plan.runs())} runs are finished in {store.folder}")
    context = plan.context(dry_run=False) if todo else None
    store.claim()
    made_with = environment()  # now: the commit may be another by the time that a run ends
    clock: dict[str, list[float]] = {}
    for method, seed in todo:
        assert context is not None
        with store.taken(method, seed) as ours:
            if not ours:
                continue  # another process has made it, or works on it
            run = {**run_one(plan, context, method, seed), "environment": made_with}
            store.save(run)
        report(plan)
        clock.setdefault(method, []).append(sum(run["seconds"].values()))
        left = [m for m, k in todo if not store.file(m, k).exists()]
        say(progress_line(plan.experiment, run, _time_left(clock, left) / processes if processes else None))
    results = report(plan)
    with contextlib.suppress(OSError):
        (store.folder / "work").rmdir()  # stays where runs of other methods or seeds are unfinished
    return results


def report(plan: Plan) -> Results:
    """Write results.json, digest.json, README.md and figures of all finished runs in the folder, whichever process made
    them."""
    with plan.store.alone():
        done = plan.store.finished()
        results = collect(plan.experiment, plan.store.identity, plan.command, done)
        write_report(plan.experiment, results, plan.store.folder)
    return results


def run_one(plan: Plan, context: Context, method: str, seed: int) -> Run:
    """Train and evaluate once, and time both. A run that goes on from its own checkpoint is marked `resumed`."""
    folder = plan.store.work(method, seed)
    resumed = any(folder.rglob("checkpoint-*"))
    folder.mkdir(parents=True, exist_ok=True)
    context = replace(context, seed=seed, folder=folder)
    start = time.perf_counter()
    with _naming(f"{method}, seed {seed}"):
        trained = plan.experiment.methods[method](context)
        middle = time.perf_counter()
        outcome = plan.experiment.evaluate(context, trained)
    end = time.perf_counter()
    announced = set(plan.experiment.metrics)
    if set(outcome.metrics) != announced:
        raise ConfigError(
            f"{plan.experiment.name}: evaluate gave {sorted(outcome.metrics)}, the metrics are {sorted(announced)}"
        )
    run = {
        "method": method,
        "seed": seed,
        "metrics": outcome.metrics,
        "seconds": {"training": round(middle - start, 2), "evaluation": round(end - middle, 2)},
        "resumed": resumed,
        "reward_evaluations": trained.reward_evaluations,
        "command": plan.command,
        "details": outcome.details,
        "records": outcome.records,
    }
    del trained
    gc.collect()  # free the models before the next method makes its own
    return finite(run)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors inside get the method's name in front, and keep their type."""
    try:
        yield
    except AmortLMError as e:
        raise type(e)(f"{what}: {e}") from e


def _time_left(clock: dict[str, list[float]], methods: Sequence[str]) -> float:
    """Seconds for the methods that are left, from other seeds of a method, or else from the mean of all methods."""
    average = {m: sum(t) / len(t) for m, t in clock.items()}
    typical = sum(average.values()) / len(average)
    return sum(average.get(m, typical) for m in methods)
