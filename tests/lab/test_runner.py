"""The runner, on an experiment of two plain functions: what it keeps, what it repeats, what it writes."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amortlm.cli import main
from amortlm.cli.commands import reproduce
from amortlm.environment import environment
from amortlm.errors import ConfigError, MissingExtraError
from amortlm.lab import command, experiments, report, runner, store
from amortlm.lab.experiment import Context, Experiment, Metric, Outcome, Trained
from amortlm.lab.experiments import EXPERIMENTS, load_experiment
from amortlm.lab.overrides import with_overrides
from amortlm.train import GFNConfig


class Toy:
    """An experiment that notes what it was asked to do. fail: method -> the error that it raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.evaluated: list[int] = []
        self.dry: list[bool] = []
        self.fail: dict[str, BaseException] = {}
        self.before: Callable[[str, Path], None] = lambda method, folder: None

    def method(self, name: str, value: float) -> Callable[[Context], Trained]:
        def train(context: Context) -> Trained:
            seed, folder = context.seed, context.folder
            self.before(name, folder)
            self.calls.append((name, seed))
            self.dry.append(context.dry_run)
            if name in self.fail:
                raise self.fail[name]
            (folder / "scratch.txt").write_text("x")
            return Trained(value * context.settings["scale"] + seed, reward_evaluations=10)

        return train

    def evaluate(self, context: Context, trained: Trained) -> Outcome:
        self.evaluated.append(context.seed)
        return Outcome({"score": trained.sampler, "odd": float("nan")}, {"worst": float("-inf")})

    def figures(self, results: dict[str, Any], folder: Path) -> list[str]:
        (folder / "plot.png").write_bytes(",".join(results["runs"]).encode())
        return ["plot.png"]

    def experiment(self) -> Experiment:
        settings = {"scale": 1.0, "steps": 5, "model": "tiny", "adam": {"lr": 0.1, "name": "a"}}
        return Experiment(
            name="toy",
            question="Which is larger?",
            presets={"smoke": {**settings, "steps": 1}, "small": settings, "paper": settings},
            prepare=lambda settings, lm, data: data,
            reads_data=True,
            methods={"one": self.method("one", 1.0), "two": self.method("two", 2.0)},
            evaluate=self.evaluate,
            metrics={
                "score": Metric("score", ".2f", "higher", "what it scores"),
                "odd": Metric("odd", ".1%", "lower"),
            },
            figures=self.figures,
            paper={"theirs": {"score": "7.0"}},
            paper_setting="a large model",
        )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(runner, "LanguageModel", SimpleNamespace(from_pretrained=lambda name: name))
    return Toy()


def run(toy: Toy, folder: Path, preset: str = "small", **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    plan = runner.make_plan(toy.experiment(), preset, folder, command="amortlm reproduce toy", **options)
    return runner.execute(plan, said.append), said


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# What is run


def test_every_method_once_before_any_second_seed(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    assert toy.calls == [(m, k) for k in range(3) for m in ("one", "two")]
    assert toy.evaluated == [0, 0, 1, 1, 2, 2]
    assert toy.dry == [False] * 6


def test_smoke_has_one_seed_and_methods_keep_the_order_of_the_table(toy: Toy, tmp_path: Path) -> None:
    results, _ = run(toy, tmp_path, "smoke", methods=["two", "one"])
    assert toy.calls == [("one", 0), ("two", 0)]
    assert list(results["runs"]) == ["one", "two"]
    assert results["settings"]["steps"] == 1


def test_finished_runs_are_kept_and_more_can_be_added(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=1, methods=["one"])
    results, said = run(toy, tmp_path, seeds=2)
    assert toy.calls == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert said[0] == f"1 of 4 runs are finished in {tmp_path}"
    assert [r["seed"] for r in results["runs"]["one"]] == [0, 1]
    again, _ = run(toy, tmp_path, seeds=2)
    assert len(toy.calls) == 4, "nothing is left to do"
    assert again["runs"] == results["runs"]


def test_a_damaged_run_is_made_again(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=1)
    (tmp_path / "runs" / "two-seed0.json").write_text('{"metrics": ')
    run(toy, tmp_path, seeds=1)
    assert toy.calls[1:] == [("two", 0), ("two", 0)]


def test_a_report_without_its_runs_is_kept(toy: Toy, tmp_path: Path) -> None:
    """results.json does not hold the records of its runs: new runs would put a poorer one in its place."""
    run(toy, tmp_path, seeds=1)
    shutil.rmtree(tmp_path / "runs")
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    with pytest.raises(ConfigError, match="a report without its runs"):
        run(toy, tmp_path, seeds=2)
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before


def test_a_report_is_written_again_from_its_results(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(toy, tmp_path, seeds=1)
    before = {name: (tmp_path / name).read_bytes() for name in ("results.json", "README.md", "plot.png")}
    for name in ("README.md", "plot.png", "settings.json"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "runs")
    calls = len(toy.calls)
    monkeypatch.chdir(tmp_path)
    command.main(toy.experiment(), ["--report-only", "--output", "."])
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before
    assert len(toy.calls) == calls
    with pytest.raises(ConfigError, match="no results.json of toy"):
        command.main(toy.experiment(), ["--report-only", "--output", "elsewhere"])


def test_records_stay_with_their_runs(toy: Toy, tmp_path: Path) -> None:
    """results.json has what the digest makes of them."""

    def evaluate(context: Context, trained: Trained) -> Outcome:
        return Outcome({"score": 1.0}, {"note": "x"}, {"score": [float(context.seed), 2.0]})

    def digest(runs: dict[str, Any]) -> Any:
        return {m: [r["records"]["score"][0] for r in of] for m, of in runs.items()}

    experiment = replace(toy.experiment(), evaluate=evaluate, digest=digest, metrics={"score": Metric("s")})
    results = runner.execute(runner.make_plan(experiment, "small", tmp_path, seeds=2), lambda _: None)
    assert results["digest"] == {"one": [0.0, 1.0], "two": [0.0, 1.0]}
    assert json.loads((tmp_path / "digest.json").read_text()) == results["digest"]
    assert "digest" not in json.loads((tmp_path / "results.json").read_text())
    assert report.report_again(experiment, tmp_path) == results
    (tmp_path / "digest.json").unlink()
    with pytest.raises(ConfigError, match="lacks its digest.json"):
        report.report_again(experiment, tmp_path)
    assert [r["details"] for r in results["runs"]["one"]] == [{"note": "x"}] * 2
    assert "records" not in results["runs"]["one"][0]
    kept = json.loads((tmp_path / "runs" / "one-seed1.json").read_text())
    assert kept["records"] == {"score": [1.0, 2.0]}


def test_of_what_is_not_random_one_seed_is_enough(toy: Toy, tmp_path: Path) -> None:
    experiment = replace(toy.experiment(), once=frozenset({"one"}))
    plan = runner.make_plan(experiment, "small", tmp_path, seeds=2)
    assert plan.runs() == [("one", 0), ("two", 0), ("two", 1)]


def test_methods_are_chosen_by_patterns(toy: Toy, tmp_path: Path) -> None:
    chosen = runner.make_plan(toy.experiment(), "small", tmp_path, methods=["t*"]).methods
    assert chosen == ["two"]


def test_a_table_with_a_row_for_each_metric(toy: Toy, tmp_path: Path) -> None:
    metrics = {"score": Metric("score|s", ".2f", spread=".1f"), "odd": Metric("odd")}
    experiment = replace(toy.experiment(), rows="metrics", metrics=metrics)
    runner.execute(runner.make_plan(experiment, "small", tmp_path), lambda _: None)
    lines = (tmp_path / "README.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split(" | ")] for line in lines if line.startswith("| score")]
    assert cells == [["| score\\|s", "2.00 ± 1.0", "3.00 ± 1.0 |"]]


def test_results_of_something_else_are_kept(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"settings": {"model": "m"}, "runs": [{"method": "GFlowNet"}]}')
    with pytest.raises(ConfigError, match="a report without its runs"):
        run(toy, tmp_path)


def test_commands_are_those_of_the_runs(toy: Toy, tmp_path: Path) -> None:
    for said, methods in (("first", ["one"]), ("second", ["two"]), ("third", None)):
        plan = runner.make_plan(toy.experiment(), "smoke", tmp_path, methods=methods, command=said)
        runner.execute(plan, lambda _: None)
    assert "```bash\nfirst\nsecond\n```" in (tmp_path / "README.md").read_text()


# Several processes


def test_a_run_that_another_process_is_at_is_left_to_it(toy: Toy, tmp_path: Path) -> None:
    """The other one finishes "one" while we are at "two"."""
    plan = runner.make_plan(toy.experiment(), "smoke", tmp_path)
    theirs = {"metrics": {"score": 9.0, "odd": None}, "method": "one", "seed": 0}
    theirs |= {
        "key": plan.store.key,
        "seconds": {"training": 0, "evaluation": 0},
        "resumed": False,
        "details": {},
    }
    theirs |= {"reward_evaluations": 0, "command": "x", "environment": environment()}
    toy.before = lambda method, folder: store.write_json(tmp_path / "runs" / "one-seed0.json", theirs)
    plan.store.claim()
    with plan.store.taken("one", 0) as ours:
        assert ours
        results, _ = run(toy, tmp_path, "smoke")
    assert toy.calls == [("two", 0)]
    assert results["summary"]["one"]["score"]["mean"] == 9.0
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_was_cut_short_is_free(toy: Toy, tmp_path: Path) -> None:
    plan = runner.make_plan(toy.experiment(), "smoke", tmp_path)
    for method in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), plan.store.taken(method, 0):
            raise KeyboardInterrupt
    run(toy, tmp_path, "smoke")
    assert toy.calls == [("one", 0), ("two", 0)]
    with plan.store.taken("one", 0) as ours:
        assert not ours, "it is finished"


def test_who_begins_first_decides_the_settings(toy: Toy, tmp_path: Path) -> None:
    """Two commands saw an empty folder; the second one claims it while the first one is at a run."""
    ours, theirs = (
        runner.make_plan(toy.experiment(), "smoke", tmp_path, overrides={"scale": k}) for k in ("1.0", "2.0")
    )
    theirs.store.claim()
    with theirs.store.taken("one", 0):
        with pytest.raises(ConfigError, match="settings.scale: 2.0 there, 1.0 now"):
            ours.store.claim()
        with theirs.store.taken("one", 0) as again:
            assert not again, "the lock is still there"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_has_a_lock_and_files_of_its_own(name: str, tmp_path: Path) -> None:
    plan = runner.make_plan(load_experiment(name), "small", tmp_path)
    for place in (plan.store.lock, plan.store.work, plan.store.file):
        assert len({place(method, seed) for method, seed in plan.runs()}) == len(plan.runs())


ARGV = ["reproduce", "numbers", "--preset", "smoke", "--methods", "untrained", "gflownet-tb", "--seeds", "2"]


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, "--jobs", "2", "--output", str(tmp_path)]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    made = [line.split(":")[0] for line in out.splitlines() if ", seed " in line]
    assert sorted(made) == [f"{m}, seed {k}" for m in ("gflownet-tb", "untrained") for k in (0, 1)]
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'README.md'}"
    assert err == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert [[r["seed"] for r in found] for found in results["runs"].values()] == [[0, 1], [0, 1]]
    assert main([*argv, "--set", "steps=4"]) == 2  # other settings: nobody begins
    assert "other settings" in capfd.readouterr().err


@pytest.mark.slow
def test_a_helper_makes_the_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, where we make none."""
    monkeypatch.setattr(runner, "execute", lambda plan, processes: None)
    assert main([*ARGV, "--jobs", "2", "--output", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert sum(", seed " in line for line in out.splitlines()) == 4
    assert "not finished" not in out
    assert err == ""
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2


def failing(args: Namespace, threads: int) -> None:
    sys.exit(3)


@pytest.mark.slow
def test_a_helper_that_fails_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_help", failing)
    monkeypatch.setattr(runner, "execute", lambda plan, processes: None)
    assert main([*ARGV, "--jobs", "2", "--output", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert "4 of 4 runs are not finished" in out
    assert "ended with exit status 3; the same command runs the missing runs" in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"overrides": {"adam.lr": "0.2"}}, "settings.adam.lr: 0.1 there, 0.2 now"),
        ({"model": "other"}, "model: 'tiny' there, 'other' now"),
        ({"data": Path(__file__)}, "data: None there"),
        ({"preset": "smoke"}, "preset: 'small' there, 'smoke' now"),
    ],
)
def test_other_settings_need_another_folder(
    toy: Toy, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(toy, tmp_path, seeds=1)
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    with pytest.raises(ConfigError) as e:
        run(toy, tmp_path, **{"seeds": 1, **change})
    assert named in str(e.value)
    assert "give another --output, or delete" in str(e.value)
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="was made with other settings"):
        run(toy, tmp_path, **{"seeds": 1, **change})


def test_checkpoints_of_other_settings_are_not_picked_up(toy: Toy, tmp_path: Path) -> None:
    toy.before = lambda method, folder: (folder / "checkpoint-1").write_text("")
    toy.fail = {"one": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path, seeds=1)
    with pytest.raises(ConfigError, match=r"settings.steps: 5 there, 9 now"):
        run(toy, tmp_path, seeds=1, overrides={"steps": "9"})
    (tmp_path / "settings.json").unlink()
    seen: list[bool] = []
    toy.before, toy.fail = lambda method, folder: seen.append(any(folder.iterdir())), {}
    run(toy, tmp_path, seeds=1, overrides={"steps": "9"})
    assert seen == [False, False]


def test_a_folder_whose_first_try_made_nothing_is_free(toy: Toy, tmp_path: Path) -> None:
    toy.fail = {"one": ConfigError("no")}
    with pytest.raises(ConfigError):
        run(toy, tmp_path, seeds=1)
    toy.fail = {}
    run(toy, tmp_path, seeds=1, overrides={"steps": "9"})
    assert len(toy.calls) == 3


def test_data_are_compared_by_content(toy: Toy, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("1")
    out = tmp_path / "out"
    run(toy, out, seeds=1, data=data)
    run(toy, out, seeds=1, data=data)
    assert len(toy.calls) == 2
    (data / "a.csv").write_text("2")
    with pytest.raises(ConfigError, match="data: "):
        run(toy, out, seeds=1, data=data)


# Interruptions and failures


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_loses_only_its_own_run(toy: Toy, tmp_path: Path, error: BaseException) -> None:
    toy.before = lambda method, folder: (folder / f"checkpoint-{method}").write_text("")
    toy.fail = {"two": error}
    with pytest.raises(type(error)):
        run(toy, tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert list(kept["runs"]) == ["one"]
    assert "| one" in (tmp_path / "README.md").read_text()
    assert not any((tmp_path / "work").glob("one-*")), "of a finished run nothing stays in work"
    toy.fail = {}
    results, _ = run(toy, tmp_path)
    assert toy.calls[:3] == [("one", 0), ("two", 0), ("two", 0)]
    assert [r["resumed"] for r in results["runs"]["two"]] == [True, False, False]
    assert not (tmp_path / "work").exists()


def test_a_method_that_fails_names_itself_and_keeps_its_type(toy: Toy, tmp_path: Path) -> None:
    toy.fail = {"two": MissingExtraError("pip install 'amortlm[baselines]'")}
    with pytest.raises(MissingExtraError, match=r"two, seed 0: pip install"):
        run(toy, tmp_path)
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["one"]


def test_a_dry_run_writes_nothing(toy: Toy, tmp_path: Path) -> None:
    said: list[str] = []
    plan = runner.make_plan(toy.experiment(), "small", tmp_path / "out")
    runner.dry_run(plan, said.append)
    assert said == ["one: ok", "two: ok"]
    assert toy.dry == [True, True]
    assert toy.evaluated == []
    assert not (tmp_path / "out").exists()


def test_the_commit_is_that_of_the_start(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["first", "second"])
    monkeypatch.setattr("amortlm.environment._commit", lambda: next(commits))
    results, _ = run(toy, tmp_path, seeds=1)
    assert [how["environment"]["commit"] for how in results["made"]] == ["first"]
    assert [r[0]["made"] for r in results["runs"].values()] == [0, 0]


# What is written


def test_results(toy: Toy, tmp_path: Path) -> None:
    _, said = run(toy, tmp_path)
    text = (tmp_path / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert results["summary"]["two"]["score"] == {"mean": 3.0, "sd": 1.0}
    assert results["summary"]["two"]["odd"] == {"mean": None, "sd": None}
    (first, *_), environment = results["runs"]["two"], results["made"][0]["environment"]
    assert first["metrics"] == {"score": 2.0, "odd": None}
    assert first["details"] == {"worst": None}
    assert first["reward_evaluations"] == 10
    assert set(first["seconds"]) == {"training", "evaluation"}
    assert {"torch", "transformers", "numpy"} <= set(environment["packages"])
    assert environment["cores"] >= 1
    assert results["paper"]["figures"] == {"theirs": {"score": "7.0"}}
    assert said[1].startswith("two, seed 0: score 2.00, odd –  (0 s training")
    names = {f"runs/{m}-seed{k}.json" for m in ("one", "two") for k in range(3)}
    assert tree(tmp_path) == {"results.json", "README.md", "settings.json", "plot.png", *names}


def test_readme(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    text = (tmp_path / "README.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert cells[0][:3] == ["method", "score ↑", "odd ↓"]
    assert ["two", "3.00 ± 1.00", "–"] in [row[:3] for row in cells]
    assert ["theirs", "7.0", "–"] in cells, "as the paper prints it"
    assert "goes on" not in text, "a finished run does not go on"
    for part in ("Which is larger?", "amortlm reproduce toy", "![plot.png](plot.png)", "what it scores"):
        assert part in text
    assert "a large model" in text
    assert (tmp_path / "plot.png").read_text() == "one,two"


def test_time_left_comes_from_other_seeds_of_the_same_method(toy: Toy) -> None:
    assert runner._time_left({"a": [10.0, 20.0], "b": [1.0]}, ["a", "b", "c"]) == 15 + 1 + 8
    finished = {"method": "one", "seed": 0, "metrics": {"score": 1.0, "odd": 0.5}}
    finished |= {"seconds": {"training": 1.0, "evaluation": 0.0}}
    assert report.progress_line(toy.experiment(), finished, 600.0).endswith("about 10 min left")
    assert "left" not in report.progress_line(toy.experiment(), finished, None)


# Settings


def test_overrides_keep_the_kind_of_the_setting() -> None:
    settings = {"steps": 5, "rate": 0.1, "group": {"a": 1, "name": "x"}, "list": [1]}
    changed = with_overrides(settings, {"rate": "1e-3", "steps": "7.0", "group.name": "y", "list": "[2, 3]"})
    assert changed == {"steps": 7, "rate": 0.001, "group": {"a": 1, "name": "y"}, "list": [2, 3]}
    assert isinstance(changed["steps"], int)
    assert settings["group"]["name"] == "x"  # type: ignore[index]


def test_a_group_takes_any_field_of_its_class() -> None:
    """As the class declares it, whether or not the preset lists it."""
    settings = {"steps": 5, "gflownet": {"max_steps": 3}}
    given = {"gflownet.epsilon": "1e-1", "gflownet.max_steps": "4", "gflownet.temperature_range": "[1, 2]"}
    changed = with_overrides(settings, given, {"gflownet": GFNConfig, "absent": GFNConfig})
    assert changed["gflownet"] == {"max_steps": 4, "epsilon": 0.1, "temperature_range": [1.0, 2.0]}
    for key, text, message in (
        ("gflownet.epsilom", "0", "did you mean 'gflownet.epsilon'"),
        ("gflownet.epsilon", "much", "--set gflownet.epsilon must be a number, got 'much'"),
        ("gflownet.seed", "1", "no such setting"),  # --seeds says it
        ("absent.epsilon", "0", "no such setting"),
        ("epsilon", "0", "no such setting"),
    ):
        with pytest.raises(ConfigError) as e:
            with_overrides(settings, {key: text}, {"gflownet": GFNConfig, "absent": GFNConfig})
        assert message in str(e.value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_knows_every_preset(name: str) -> None:
    beyond = {"paper"} if name == "dice" else set()  # an experiment that is not the paper's
    assert set(load_experiment(name).presets) == set(experiments.PRESETS) - beyond


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in EXPERIMENTS for p in load_experiment(n).presets]
)
def test_every_preset_of_every_experiment_takes_every_field(name: str, preset: str) -> None:
    experiment = load_experiment(name)
    for group, kind in experiment.groups.items():
        given = {f"{group}.{f.name}": "1" for f in fields(kind) if f.type in ("int", "float")}
        given = {k: v for k, v in given.items() if not k.endswith("seed")}
        found = with_overrides(experiment.presets[preset], given, experiment.groups)
        assert len(given) > 3
        assert all(found[group][key.split(".")[1]] == 1 for key in given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"step": "3"}}, "did you mean 'steps'?"),
        ({"overrides": {"adam.rl": "3"}}, "did you mean 'adam.lr'?"),
        ({"overrides": {"steps.lr": "3"}}, "no such setting"),
        ({"overrides": {"lora": "3"}}, "lora is now called adapter: write adapter"),
        ({"overrides": {"lora.long": "3"}}, "write adapter.long"),
        ({"overrides": {"adam": "3"}}, "set one of adam.lr, adam.name"),
        ({"overrides": {"steps": "few"}}, "expected a number like 5, got 'few'"),
        ({"methods": ["tow"]}, "did you mean 'two'?"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"preset": "smal"}, "did you mean 'small'?"),
    ],
)
def test_bad_options(toy: Toy, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        run(toy, tmp_path / "out", **options)
    assert message in str(e.value)
    assert not (tmp_path / "out").exists()


def test_metrics_must_be_those_that_were_announced(toy: Toy, tmp_path: Path) -> None:
    experiment = replace(toy.experiment(), metrics={"score": Metric("score")})
    with pytest.raises(ConfigError, match="evaluate gave"):
        runner.execute(runner.make_plan(experiment, "smoke", tmp_path), lambda _: None)


# The command


@pytest.fixture
def toy_command(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(experiments, "load_experiment", lambda name: toy.experiment())
    return toy


def test_the_command(toy_command: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["reproduce", "numbers", "--preset", "smoke", "--set", "scale=2", "--output", str(tmp_path)]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'README.md'}"
    assert out.splitlines()[-2].split()[:2] == ["two", "4.00"]
    assert json.loads((tmp_path / "results.json").read_text())["command"].startswith(
        "amortlm reproduce numbers --preset smoke --set scale=2"
    )


def test_the_command_says_in_one_line_what_went_wrong(
    toy_command: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "numbers", "--output", str(tmp_path)]
    for error, status, words in (
        (MissingExtraError("install it"), 2, "two, seed 0: install it"),
        (OSError(28, "No space left on device"), 2, "Earlier saves are intact"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ):
        toy_command.fail = {"two": error}
        assert main(argv) == status
        err = capfd.readouterr().err
        assert words in err
        assert err.count("\n") == 1
