"""Runs an experiment: every method and seed, saved one by one, so that an interruption loses only the last.

DIR/settings.json               what the runs in DIR share; other settings need another DIR
DIR/runs/METHOD-seedK.json      a finished run
DIR/work/METHOD-seedK/          of a run that is not finished, locked by the process that is at it
DIR/results.json, README.md     everything finished so far (`amortlm.lab.reproduce.report`)

Several processes can work in one DIR: each takes the next run that nobody has.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from amortlm.errors import AmortLMError, ConfigError, nearest
from amortlm.lab.reproduce.experiment import Context, Experiment, Outcome, Settings
from amortlm.lab.reproduce.report import Run, collect, progress_line, write_report
from amortlm.lab.reproduce.storage import environment, finite, write_json

NOTE = "settings.json"
DEFAULT_SEEDS = {"smoke": 1}  # other presets: 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A command, checked. identity: what all runs of one folder share, and a run must agree with to be kept."""

    experiment: Experiment
    preset: str
    settings: Settings
    model: str | None
    data: Path | None
    methods: list[str]
    seeds: int
    output: Path
    command: str
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def runs(self) -> list[tuple[str, int]]:
        """Every method once before any second seed: an early end leaves a table with all methods."""
        return [(method, seed) for seed in range(self.seeds) for method in self.methods]


def make_plan(
    experiment: Experiment,
    preset: str,
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    overrides: dict[str, Any] | None = None,
    command: str = "",
) -> Plan:
    """Raises ConfigError for an unknown preset, method or setting and for fewer than one seed."""
    if preset not in experiment.presets:
        raise ConfigError(f"unknown preset {preset!r}; {nearest(preset, experiment.presets)}")
    settings = with_overrides(experiment.presets[preset], overrides or {})
    for method in methods or []:
        if method not in experiment.methods:
            raise ConfigError(f"unknown method {method!r}; {nearest(method, experiment.methods)}")
    seeds = DEFAULT_SEEDS.get(preset, 3) if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    identity = {
        "experiment": experiment.name,
        "preset": preset,
        "settings": settings,
        "model": model or settings.get("model"),
        "data": _fingerprint(data) or settings.get("data"),
    }
    identity = json.loads(json.dumps(identity, default=str))  # as it will be read back
    chosen = [name for name in experiment.methods if not methods or name in methods]
    return Plan(experiment, preset, settings, model, data, chosen, seeds, output, command, identity)


def with_overrides(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """A copy with KEY=VALUE settings; "a.b" is setting b in group a. Raises ConfigError for an unknown key."""
    out = json.loads(json.dumps(settings))
    for key, value in overrides.items():
        *groups, last = key.split(".")
        place = out
        for part in (*groups, last):
            if not isinstance(place, dict) or part not in place:
                valid = sorted(_names(settings))
                raise ConfigError(f"--set {key}: no such setting; {nearest(key, valid)}")
            parent, place = place, place[part]
        if isinstance(place, dict):
            raise ConfigError(
                f"--set {key} is a group of settings; set one of {', '.join(_names(place, key))}"
            )
        parent[last] = _typed(key, value, place)
    return out


def _names(settings: Settings, prefix: str = "") -> list[str]:
    out = []
    for key, value in settings.items():
        name = f"{prefix}.{key}" if prefix else key
        out += _names(value, name) if isinstance(value, dict) else [name]
    return out


def _typed(key: str, value: Any, default: Any) -> Any:
    """YAML reads 1e-3 as text: numbers stay numbers, and a number is not replaced by anything else."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"--set {key}: expected a number like {default!r}, got {value!r}") from None
    return int(number) if isinstance(default, int) and number.is_integer() else number


def _fingerprint(data: Path | None) -> str | None:
    """A hash of the files under a path (or of its name, where the experiment will complain that it is missing)."""
    if data is None:
        return None
    digest = hashlib.sha256(data.name.encode())
    for file in sorted(p for p in [data, *data.rglob("*")] if p.is_file()):
        digest.update(file.relative_to(data).as_posix().encode() + file.read_bytes())
    return f"{data} (sha256 {digest.hexdigest()[:16]})"


def dry_run(plan: Plan, say: Say = print) -> None:
    """Build every method up to its first step, in a folder that goes away again."""
    context = plan.experiment.prepare(plan.settings, plan.model, plan.data, True)
    for method in plan.methods:
        with tempfile.TemporaryDirectory() as folder, _naming(method):
            plan.experiment.methods[method](context, 0, Path(folder))
        say(f"{method}: ok")


def execute(plan: Plan, say: Say = print, processes: int = 0) -> dict[str, Any]:
    """Run what is not finished in the output folder, and return everything finished, as in results.json.

    A method that fails raises its AmortLMError: what is finished stays, and the same command goes on from there.
    Raises ConfigError where the folder holds runs of other settings. processes: how many work in the folder, to say
    what time is left (0: not said).
    """
    experiment, done = plan.experiment, finished_runs(plan)
    todo = [run for run in plan.runs() if run not in done]
    if done:
        say(f"{len(plan.runs()) - len(todo)} of {len(plan.runs())} runs are finished in {plan.output}")
    context = experiment.prepare(plan.settings, plan.model, plan.data, False) if todo else None
    claim_folder(plan)
    made_with = environment()  # now: the source tree may have moved on by the time that a run ends
    clock: dict[str, list[float]] = {}
    for method, seed in todo:
        assert context is not None
        with taken(plan, method, seed) as ours:
            if not ours:
                continue  # another process has made it, or is at it
            run = {**run_one(plan, context, method, seed), "environment": made_with}
            write_json(_file(plan, method, seed), run)
            shutil.rmtree(_work(plan, method, seed), ignore_errors=True)
        report(plan)
        clock.setdefault(method, []).append(sum(run["seconds"].values()))
        left = [m for m, k in todo if not _file(plan, m, k).exists()]
        say(progress_line(experiment, run, _time_left(clock, left) / processes if processes else None))
    results = report(plan)
    with contextlib.suppress(OSError):
        (plan.output / "work").rmdir()  # stays where runs of other methods or seeds are unfinished
    return results


def report(plan: Plan) -> dict[str, Any]:
    """Write results.json, README.md and figures of all runs that are finished in the folder, whoever made them."""
    with _alone(plan):
        results = collect(plan.experiment, plan.identity, plan.command, finished_runs(plan))
        write_report(plan.experiment, results, plan.output)
    return results


@contextlib.contextmanager
def taken(plan: Plan, method: str, seed: int) -> Iterator[bool]:
    """Whether this run is ours to make. A lock dies with its process, so what was cut short is free again."""
    lock = FileLock(_lock(plan, method, seed))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield _read(_file(plan, method, seed)) is None
    finally:
        _drop(lock)


@contextlib.contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """One process at a time writes what all share."""
    lock = FileLock(plan.output / ".lock")
    lock.acquire()
    try:
        yield
    finally:
        _drop(lock)


def _drop(lock: FileLock) -> None:
    """Give a lock back and take its file away. Who waited for it finds that the file is gone, and makes a new one."""
    with contextlib.suppress(OSError):  # Windows keeps a file that is open
        Path(lock.lock_file).unlink()
    lock.release()


def run_one(plan: Plan, context: Context, method: str, seed: int) -> Run:
    """Train and evaluate once, timed apart. A run that goes on from its own checkpoint is marked `resumed`."""
    folder = _work(plan, method, seed)
    resumed = any(folder.glob("checkpoint-*"))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _naming(f"{method}, seed {seed}"):
        trained = plan.experiment.methods[method](context, seed, folder)
        middle = time.perf_counter()
        outcome = plan.experiment.evaluate(context, trained, seed)
    end = time.perf_counter()
    _check(plan.experiment, outcome)
    run = {
        "key": plan.key,
        "method": method,
        "seed": seed,
        "metrics": outcome.metrics,
        "seconds": {"training": round(middle - start, 2), "evaluation": round(end - middle, 2)},
        "resumed": resumed,
        "reward_evaluations": trained.reward_evaluations,
        "command": plan.command,
        "details": outcome.details,
    }
    del trained
    gc.collect()  # models of one method do not wait for the next one's
    return finite(run)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors within say what failed, and keep their type."""
    try:
        yield
    except AmortLMError as e:
        raise type(e)(f"{what}: {e}") from e


def _check(experiment: Experiment, outcome: Outcome) -> None:
    if set(outcome.metrics) != set(experiment.metrics):
        raise ConfigError(
            f"{experiment.name}: evaluate gave {sorted(outcome.metrics)}, the metrics are {sorted(experiment.metrics)}"
        )


def finished_runs(plan: Plan) -> dict[tuple[str, int], Run]:
    """What the output folder holds already. Raises ConfigError where that was made with other settings."""
    remedy = f"give another --output, or delete {plan.output}"
    found = _read(plan.output / NOTE)
    begun = any(p.is_file() for part in ("runs", "work") for p in (plan.output / part).rglob("*"))
    if begun and found is not None and found != plan.identity:
        difference = _difference(found, plan.identity)
        raise ConfigError(f"{plan.output} holds runs of other settings ({difference}); {remedy}")
    done = {(run["method"], run["seed"]): run for run in _reported(plan, remedy)}
    for file in sorted((plan.output / "runs").glob("*-seed*.json")):
        run = _read(file)
        if run is None:
            continue
        if run.get("key") != plan.key:
            raise ConfigError(f"{file} was made with other settings; {remedy}")
        done[run["method"], run["seed"]] = run
    return done


def _reported(plan: Plan, remedy: str = "") -> list[Run]:
    """The runs of a results.json that stands alone: of a report that was handed on, without runs/.

    Raises ConfigError where it was made with other settings.
    """
    file = plan.output / "results.json"
    found = _read(file)
    if found is None or (plan.output / "runs").exists():
        return []
    there = {name: found.get(name) for name in plan.identity}
    if there != plan.identity:
        raise ConfigError(f"{file} holds other results ({_difference(there, plan.identity)}); {remedy}")
    return [
        {"key": plan.key, "method": method, **run} for method, runs in found["runs"].items() for run in runs
    ]


def claim_folder(plan: Plan) -> None:
    """Note what the runs of the output folder share, before the first one.

    Raises ConfigError where another process has just begun with other settings.
    """
    with _alone(plan):
        finished_runs(plan)
        if _read(plan.output / NOTE) != plan.identity:
            # Checkpoints of settings that nobody knows.
            shutil.rmtree(plan.output / "work", ignore_errors=True)
            write_json(plan.output / NOTE, plan.identity)
        _unpack(plan)


def _unpack(plan: Plan) -> None:
    """A file for each run of a results.json that stands alone; all of them or none."""
    if not (runs := _reported(plan)):
        return
    part = plan.output / "runs.part"
    shutil.rmtree(part, ignore_errors=True)
    for run in runs:
        write_json(part / _file(plan, run["method"], run["seed"]).name, run)
    part.rename(plan.output / "runs")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # a damaged file counts as absent: its run is made again
    return found if isinstance(found, dict) else None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs: "settings.steps: 3 there, 250 now"."""
    flat_old, flat_new = ({n: _at(d, n) for n in _names(d)} for d in (old, new))
    for name in sorted(flat_old | flat_new):
        if flat_old.get(name) != flat_new.get(name):
            return f"{name}: {flat_old.get(name)!r} there, {flat_new.get(name)!r} now"
    return "another layout"


def _at(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value


def _time_left(clock: dict[str, list[float]], methods: Sequence[str]) -> float:
    """Seconds, from the same method's other seeds, or else from the mean of what ran."""
    average = {m: sum(t) / len(t) for m, t in clock.items()}
    typical = sum(average.values()) / len(average)
    return sum(average.get(m, typical) for m in methods)


def _file(plan: Plan, method: str, seed: int) -> Path:
    return plan.output / "runs" / f"{method}-seed{seed}.json"


def _work(plan: Plan, method: str, seed: int) -> Path:
    return plan.output / "work" / f"{method}-seed{seed}"


def _lock(plan: Plan, method: str, seed: int) -> Path:
    return plan.output / "work" / f"{method}-seed{seed}.lock"
