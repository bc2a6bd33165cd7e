"""The command line, on a tiny model that is saved to a folder: what it prints, writes and returns."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from amortlm import GFNTrainer, LanguageModel, Posterior
from amortlm.cli import main
from amortlm.diagnostics.certificate import finite
from amortlm.posterior import Sample, Samples
from amortlm.train.spec import settings_from_text

ROWS = [{"x": "the dog", "y": " ran"}, {"x": "a", "y": " a cat"}]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models["llama-untied"].model.save_pretrained(folder)
    models["llama-untied"].tokenizer.save_pretrained(folder)
    return folder


def write_spec(folder: Path, model: Path, **changes: Any) -> Path:
    spec: dict[str, Any] = {
        "model": str(model),
        "prompt": "{x}",
        "target": [{"log_prob": {"of": "{z}{y}", "given": "{x}"}}],
        "support": {"stop": ".", "max_tokens": 3, "allowed_tokens": [" a", " cat", " dog", "s"]},
        "data": ROWS,
        "adapter": 2,
        "config": {
            "max_steps": 2, "num_samples": 4, "per_device_train_batch_size": 2, "save_steps": 1,
            "diagnose_steps": 1, "warmup_steps": 0, "learning_rate": "1e-2", "use_cpu": True,
        },
    }  # fmt: skip
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**spec, **changes}))
    return file


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps. Tests read it."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(write_spec(folder, model)), "--output", str(folder / "out")]) == 0
    return folder / "out"


def assert_quiet(stderr: str) -> None:
    """No progress bar, no log line, no warning."""
    assert stderr == ""


def failure(result: tuple[int, str, str]) -> str:
    """The one line that a command that failed wrote to stderr."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("amortlm: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


# Training


def test_train_writes_a_posterior_and_says_what_to_do_next(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = cli("train", write_spec(tmp_path, model), "--output", out)
    assert status == 0
    assert stdout.splitlines() == [f"saved {out}", f"try:  amortlm sample {out}"]
    assert_quiet(stderr)
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (out / "checkpoint-1").is_dir()
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == ROWS
    steps = {json.loads(line)["step"] for line in (out / "looks.jsonl").read_text().splitlines()}
    assert steps == {0, 1, 2}
    posterior = Posterior.from_pretrained(out)
    assert posterior.lm.name == str(model)
    assert any(p.abs().sum() > 0 for name, p in posterior.policy.named_parameters() if "lora_B" in name), (
        "two steps have moved the adapter"
    )


def test_the_default_folder_has_the_name_of_the_file(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path, model)
    status, stdout, _ = cli("train", spec, "--set", "max_steps=1", "--set", "diagnose_steps=0")
    assert status == 0
    assert stdout.splitlines()[0] == "saved runs/tiny"
    assert (tmp_path / "runs" / "tiny" / "posterior.json").exists()
    assert not (tmp_path / "runs" / "tiny" / "checkpoint-2").exists(), "--set wins over the file"


def test_options_win_over_the_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("x,y\na dog, ran\n")
    spec = write_spec(tmp_path, Path("no/such/model"), data="no_such_file.csv")
    settings = ["--set", "max_steps=1", "--set", "seed=5", "--set", "learning_rate=2e-3"]
    status, _, stderr = cli(
        "train", spec, "--model", model, "--data", data, "--output", tmp_path / "out", *settings
    )
    assert (status, stderr) == (0, "")
    written = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert (written["max_steps"], written["seed"], written["learning_rate"]) == (1, 5, 0.002)
    assert json.loads((tmp_path / "out" / "rows.jsonl").read_text()) == {"x": "a dog", "y": " ran"}


def test_resume_goes_on_from_the_last_checkpoint(
    cli: Cli, model: Path, tmp_path: Path, trained: Path
) -> None:
    """The second step after a resume gives the adapter of the run that was not interrupted."""
    out = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-1", out / "checkpoint-1")
    status, stdout, stderr = cli("train", write_spec(tmp_path, model), "--output", out, "--resume")
    assert status == 0
    assert stdout.startswith(f"saved {out}")
    assert_quiet(stderr)
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert log["global_step"] == 2
    expected, got = (load_file(f / "adapter_model.safetensors") for f in (trained, out))
    first = load_file(trained / "checkpoint-1" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    assert all((expected[k] - got[k]).abs().max() < 1e-6 for k in expected)
    assert any((expected[k] - first[k]).abs().max() > 1e-4 for k in expected)


def test_a_used_folder_is_neither_overwritten_nor_taken_for_anothers(
    cli: Cli, model: Path, tmp_path: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    spec = write_spec(tmp_path, model)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert "already holds a run" in failure(cli("train", spec, "--output", out, "--model", "no/such/model"))
    other = ["train", spec, "--output", out, "--set", "seed=7"]
    assert "of another run: seed was 42, is 7." in failure(cli(*other, "--resume"))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before
    status, stdout, _ = cli("train", spec, "--output", out, "--resume")
    assert (status, stdout.splitlines()[0]) == (0, f"saved {out}")
    assert "this run is already finished" in caplog.text
    status, stdout, _ = cli(*other, "--overwrite")
    assert (status, stdout.splitlines()[0]) == (0, f"saved {out}")
    assert json.loads((out / "training_args.json").read_text())["seed"] == 7
    with pytest.raises(SystemExit):
        cli(*other, "--overwrite", "--resume")


@pytest.mark.parametrize("strategy", ["no", "'no'"])
def test_without_checkpoints_the_posterior_is_saved(
    cli: Cli, model: Path, tmp_path: Path, strategy: str
) -> None:
    out = tmp_path / "out"
    options = ["--set", f"save_strategy={strategy}", "--set", "max_steps=1"]
    status, stdout, _ = cli("train", write_spec(tmp_path, model), "--output", out, *options)
    assert (status, stdout.splitlines()[0]) == (0, f"saved {out}")
    assert not list(out.glob("checkpoint-*"))
    assert cli("sample", out, "-n", 1)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_in_order(
    cli: Cli,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    """While a model is loaded, and in training; then handlers are what they were."""
    out, before = tmp_path / "out", signal.getsignal(number)
    command = ["train", write_spec(tmp_path, model), "--output", out]
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "from_pretrained", lambda *args, **kwargs: signal.raise_signal(number))
        status, _, stderr = cli(*command)
    assert status == 128 + number
    assert (
        stderr == f"amortlm: ended by {number.name}; nothing was saved yet: the same command starts again\n"
    )
    step = GFNTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(GFNTrainer, "training_step", lambda *args: signal.raise_signal(number) or step(*args))
        status, _, stderr = cli(*command)
    assert status == 128 + number
    assert f"{number.name}: saved {out / 'checkpoint-1'}" in caplog.text
    assert f"ended by {number.name}; the same command with --resume continues from the last" in stderr
    assert cli(*command, "--resume")[0] == 0
    assert signal.getsignal(number) is before


def test_resume_without_a_checkpoint(cli: Cli, model: Path, tmp_path: Path) -> None:
    line = failure(cli("train", write_spec(tmp_path, model), "--output", tmp_path / "out", "--resume"))
    assert "holds no complete checkpoint" in line


# Sampling


def test_sample_prints_a_table_for_the_first_training_row(cli: Cli, trained: Path) -> None:
    status, stdout, stderr = cli("sample", trained, "-n", 7)
    assert status == 0
    assert_quiet(stderr)
    lines = stdout.rstrip("\n").splitlines()
    assert lines[:2] == ["x: the dog", "y:  ran"]
    assert re.split(r"\s{2,}", lines[2].strip()) == ["completion", "log q", "log R", "weight"]
    samples = Posterior.from_pretrained(trained).sample(ROWS[0], 7)
    assert len(lines) == 4 + 7
    for line, s in zip(lines[4:], samples, strict=True):
        figures = [f"{v:.3f}" for v in (s.log_q, s.log_reward, s.weight)]
        assert line.split()[-3:] == figures
        assert line.strip().startswith(s.text.strip())


def test_sample_json_is_a_line_for_every_completion(cli: Cli, trained: Path) -> None:
    status, stdout, stderr = cli("sample", trained, "--json", "-n", 3, "--seed", 4)
    assert (status, stderr) == (0, "")
    lines = [json.loads(line) for line in stdout.splitlines()]
    samples = Posterior.from_pretrained(trained).sample(ROWS[0], 3, seed=4)
    assert lines == [{"row": ROWS[0], **s.to_dict()} for s in samples]
    assert cli("sample", trained, "--json", "-n", 3, "--seed", 4)[1] == stdout
    assert cli("sample", trained, "--json", "-n", 3, "--seed", 5)[1] != stdout


def test_rows_come_from_columns_or_a_file(cli: Cli, trained: Path, tmp_path: Path) -> None:
    status, stdout, _ = cli("sample", trained, "--json", "-n", 1, "--column", "x=a=b", "--column", "y= a")
    assert status == 0
    assert [json.loads(line)["row"] for line in stdout.splitlines()] == [{"x": "a=b", "y": " a"}]
    data = tmp_path / "rows.csv"
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["x", "y"])
        writer.writeheader()
        writer.writerows(ROWS)
    status, stdout, _ = cli("sample", trained, "--json", "-n", 2, "--data", data)
    assert status == 0
    assert [json.loads(line)["row"] for line in stdout.splitlines()] == [ROWS[0]] * 2 + [ROWS[1]] * 2


def test_a_posterior_whose_model_has_moved(cli: Cli, trained: Path, model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    spec = json.loads((moved / "posterior.json").read_text())
    (moved / "posterior.json").write_text(json.dumps({**spec, "model": "not/here"}))
    assert "cannot load a causal LM from 'not/here'" in failure(cli("sample", moved))
    status, stdout, _ = cli("sample", moved, "--model", model, "--json")
    assert status == 0
    assert stdout == cli("sample", trained, "--json")[1]


# Evaluation


def test_evaluate_prints_and_writes_the_diagnosis(cli: Cli, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    status, stdout, stderr = cli("evaluate", trained, "-n", 40, "--output", file)
    assert status == 0
    assert_quiet(stderr)
    diagnosis = Posterior.from_pretrained(trained).diagnose(ROWS, 40)
    assert stdout == f"{diagnosis}\nwrote {file}\n"
    assert json.loads(file.read_text()) == finite([row.to_dict() for row in diagnosis.rows])
    assert diagnosis.rows[1].distance is not None
    assert 0 < diagnosis.rows[1].distance.total_variation < 1


def test_evaluate_at_most_so_many_rows(cli: Cli, trained: Path) -> None:
    _, stdout, _ = cli("evaluate", trained, "-n", 30, "--rows", 1)
    table, _ = stdout.split("\n\n")
    assert len(table.splitlines()) == 3, "head, rule and one row"


def test_evaluate_at_a_level_with_gold(cli: Cli, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({**ROWS[0], "z": " cat"}) + "\n")
    options = ["-n", 30, "--data", data, "--level", 0.9, "--gold"]
    status, stdout, _ = cli("evaluate", trained, *options, "z")
    assert status == 0
    assert "level 0.9" in stdout
    assert "row 0 has no column 'gold'" in failure(cli("evaluate", trained, *options, "gold"))


# Errors


def test_a_task_that_does_not_exist(cli: Cli) -> None:
    assert "unknown task 'numbres'; did you mean 'numbers'?" in failure(cli("train", "numbres"))


def test_a_yaml_file_that_does_not_exist(cli: Cli, tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert f"; amortlm new {missing} writes a file" in failure(cli("train", missing))


def test_errors_of_several_lines_become_one(cli: Cli, tmp_path: Path, model: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("prompt: [unclosed\nsupport: a\n")
    assert "is not valid YAML" in failure(cli("train", bad))
    spec = write_spec(tmp_path, tmp_path / "no model")
    assert "Give a hub name, a local folder" in failure(cli("train", spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "max_step=3"], "did you mean 'max_steps'?"),
        (["--set", "max_steps"], "--set 'max_steps': write --set NAME=VALUE"),
        (["--set", "max_steps=few"], "max_steps must be a whole number, got 'few'"),
        (["--set", "objective=mcmc"], "unknown objective 'mcmc'"),
        (["--data", "none.jsonl"], "cannot read data file none.jsonl"),
        (["--data", "rows.xlsx"], "rows.xlsx"),
    ],
)
def test_bad_options_of_train(
    cli: Cli, model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert message in failure(cli("train", write_spec(tmp_path, model), "--output", out, *options))
    assert not out.exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_bad_rows(cli: Cli, trained: Path, command: str) -> None:
    assert "row 0 has no column 'y'" in failure(cli(command, trained, "--column", "x=a"))
    assert "--column 'x': write --column NAME=VALUE" in failure(cli(command, trained, "--column", "x"))
    assert "n must be at least 1" in failure(cli(command, trained, "-n", 0))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model or a posterior, which may take minutes, fails the test."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded before the options were checked")

    monkeypatch.setattr(LanguageModel, "from_pretrained", loaded)
    monkeypatch.setattr(Posterior, "from_pretrained", loaded)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sample", ["-n", 0], "-n must be at least 1, got 0"),
        ("sample", ["-n", -3], "-n must be at least 1, got -3"),
        ("sample", ["--correct", "sir", "--budget", 0], "--budget must be at least 1, got 0"),
        ("sample", ["--budget", 9], "--budget is for corrected samples: also give --correct sir, smc or mh"),
        ("sample", ["--correct", "sire"], "unknown correction 'sire'; did you mean 'sir'?"),
        ("sample", ["--column", "x=a", "--column", "x=b"], "--column x= is given twice"),
        ("sample", ["--data", "none.csv"], "cannot read data file none.csv"),
        ("evaluate", ["-n", 0], "-n must be at least 1, got 0"),
        ("evaluate", ["--rows", 0], "--rows must be at least 1, got 0"),
        ("evaluate", ["--rows", -1], "--rows must be at least 1, got -1"),
        ("evaluate", ["--level", 2], "--level must lie between 0 and 1, got 2"),
        ("evaluate", ["--level", 0], "--level must lie between 0 and 1, got 0"),
        ("evaluate", ["--level", "nan"], "--level must lie between 0 and 1, got nan"),
        ("evaluate", ["--output", "no/f.json"], "cannot write the file no/f.json: there is no folder no"),
        ("evaluate", ["--output", "."], "cannot write the file .: it is a folder"),
        ("evaluate", ["--check"], "has no certificate to check: training with --set stop_at_gap=0.05"),
    ],
)  # fmt: skip
def test_options_are_checked_before_anything_is_loaded(
    cli: Cli, trained: Path, command: str, options: list[object], message: str
) -> None:
    assert message in failure(cli(command, trained, *options))


@pytest.mark.usefixtures("no_model")
def test_the_output_folder_is_checked_before_anything_is_loaded(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    spec = write_spec(tmp_path, model)
    for out in (tmp_path / "file", tmp_path / "file" / "out" / "deep"):
        line = failure(cli("train", spec, "--output", out))
        assert (
            line
            == f"amortlm: cannot write to the folder {out}: {tmp_path / 'file'} is a file; give another --output\n"
        )
        assert "is a file; give another --output" in failure(cli("reproduce", "numbers", "--output", out))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("save_strategy", "no", "no"), ("save_strategy", "false", "false"), ("run_name", "5", "5"), ("max_steps", "5", 5),
        ("learning_rate", "1e-3", "1e-3"), ("bf16", "false", False), ("temperature_range", "[0.5, 2]", [0.5, 2]),
        ("report_to", "null", None), ("report_to", "[a, b]", ["a", "b"]), ("objective", "tb", "tb"),
        ("objective", "{subtb: {lam: 0.9, states: null}}", {"subtb": {"lam": 0.9, "states": None}}),
        ("behaviour", "{replay: .5}", {"replay": ".5"}),
    ],
)  # fmt: skip
def test_what_set_means_depends_on_the_setting(name: str, text: str, value: object) -> None:
    assert settings_from_text({name: text}) == {name: value}


def test_set_no_saves_no_checkpoints(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = write_spec(tmp_path, model)
    cli("train", spec, "--output", out, "--set", "save_strategy=no", "--set", "max_steps=1")
    assert not list(out.glob("checkpoint-*"))


def test_numbers_as_text_stay_text(cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples([Sample(" 25.", [5], -1.0, -2.0, 1.0), Sample(" 007.", [6], -1.0, -2.0, 0.0)])
    monkeypatch.setattr(Posterior, "sample", lambda *args, **kwargs: samples)
    _, stdout, _ = cli("sample", trained)
    assert [line.split() for line in stdout.strip().splitlines()[-2:]] == [
        ["25.", "-1.000", "-2.000", "1.000"],
        ["007.", "-1.000", "-2.000", "0.000"],
    ]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_folders_that_are_no_posterior(cli: Cli, trained: Path, tmp_path: Path, command: str) -> None:
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        line = failure(cli(command, folder, "--column", "x=a"))
        assert "posterior.json is missing or damaged" in line
        assert "Give a folder that `amortlm train`" in line
    (tmp_path / "run.json").write_text("{}")
    assert "Its training has not ended: train with --resume" in failure(
        cli(command, tmp_path, "--column", "x=a")
    )
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "the save is incomplete" in failure(cli(command, cut))


def test_a_posterior_without_rows_asks_for_one(cli: Cli, trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("checkpoint-*", "rows.jsonl"))
    assert "no rows are given: give --column NAME=TEXT" in failure(cli("sample", bare))


def test_an_interrupt_is_no_traceback(cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Posterior, "sample", interrupt)
    status, _, stderr = cli("sample", trained)
    assert status == 130
    assert stderr == "amortlm: ended by SIGINT\n"


@pytest.mark.parametrize("argv", [[], ["trian"], ["sample"], ["train", "numbers", "--ste", "a=1"]])
def test_wrong_usage_is_explained_by_argparse(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert "usage: amortlm" in capfd.readouterr().err


def test_a_misspelled_option_is_answered_with_those_of_its_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "runs/mine", "--columns", "x=a"])
    err = capfd.readouterr().err
    assert "usage: amortlm sample" in err
    assert "unrecognized arguments: --columns x=a; did you mean '--column'?" in err


def test_without_a_command_all_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "draw from a saved posterior" in capfd.readouterr().err


# Help

HELP = """
import sys
from amortlm.cli import main
try:
    main({argv})
except SystemExit as e:
    assert e.code == 0
heavy = {{"torch", "transformers", "peft", "datasets", "numpy", "yaml"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"], ["new", "mine.yaml"]])
def test_what_needs_no_model_imports_nothing_heavy(argv: list[str], tmp_path: Path) -> None:
    code = HELP.format(argv=[str(tmp_path / arg) if arg == "mine.yaml" else arg for arg in argv])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "heavy: []"
    assert out.stderr == ""
    words = {
        "--help": ["train", "sample", "evaluate"],
        "train": ["numbers", "--resume", "--set"],
        "--version": ["amortlm 0"],
        "new": ["wrote", "mine.yaml"],
    }
    assert all(word in out.stdout for word in words[argv[0]])


WRONG = """
import sys
from amortlm.cli import main
status = main({argv})
heavy = {{"torch", "transformers", "peft", "datasets", "numpy"}} & set(sys.modules)
print("heavy:", sorted(heavy), "status:", status)
"""


def test_wrong_files_are_answered_before_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("prompt: [unclosed\n")
    spec = {"prompt": "{x}", "target": [], "support": {"stop": "."}, "data": "none.csv"}
    (tmp_path / "no_rows.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "rows.jsonl").write_text('{"x": 1\n')
    (tmp_path / "posterior.json").write_text("{")
    expected = {
        ("train", "numbres"): "did you mean 'numbers'?",
        ("train", "none.yaml"): "amortlm new none.yaml writes a file to start from",
        ("train", "bad.yaml"): "is not valid YAML",
        ("train", "no_rows.yaml"): "cannot read data file none.csv",
        ("train", "no_rows.yaml", "--data", "rows.jsonl"): "data file rows.jsonl, line 1",
        ("sample", "user/name", "--data", "none.csv"): "cannot read data file none.csv",
        ("evaluate", "."): "posterior.json is missing or damaged",
        ("table", "none"): "posterior.json is missing or damaged (there is no such file)",
        ("push", "no/folder", "user/name"): "posterior.json is missing or damaged (there is no such file)",
        ("serve", "none"): "posterior.json is missing or damaged (there is no such file)",
        ("report", "."): "holds no run (run.json)",
    }
    runs = [
        f"print({' '.join(argv)!r}, end=': ', file=sys.stderr, flush=True); main({list(argv)!r})"
        for argv in expected
    ]
    code = WRONG.format(argv=["evaluate", "none"]).replace("status =", "; ".join(runs) + "\nstatus =")
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == "heavy: [] status: 2"
    for argv, message in expected.items():
        line = next(line for line in out.stderr.splitlines() if line.startswith(f"{' '.join(argv)}: "))
        assert line.startswith(f"{' '.join(argv)}: amortlm: "), line
        assert message in line, line


def test_a_pipe_sees_no_progress_bar(model: Path, tmp_path: Path) -> None:
    """The command as a process of its own, with stdout and stderr in pipes."""
    spec = write_spec(tmp_path, model)
    argv = ["train", str(spec), "--output", str(tmp_path / "out"), "--set", "max_steps=1"]
    code = f"import sys; from amortlm.cli import main; sys.exit(main({argv!r}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[0] == f"saved {tmp_path / 'out'}"
    for text in (out.stdout, out.stderr):
        assert not re.search("\r|\x1b|%\\||it/s|█", text), text
