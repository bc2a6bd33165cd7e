"""`amortlm table`, `doctor`, `new`, `completion` and `evaluate --card`: what they print and write."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import tiny_policy

from amortlm import LanguageModel, Posterior, Support, __version__
from amortlm.inference import pool, truth
from amortlm.policy import laws
from amortlm.policy.laws import Sampling, affordable, examine_sampling
from amortlm.policy.policy import Policy
from amortlm.train.spec import RunSpec
from amortlm.types import PolicyLogProbs

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(embedded: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    support = Support(stop=".", max_tokens=2, allowed_tokens=(" 1", " 2", " 3"))
    Posterior(tiny_policy(embedded, "{x}", support), embedded.log_prob("{z}", given="{x}")).save_pretrained(
        folder
    )
    (folder / "rows.jsonl").write_text('{"x": "One"}\n{"x": "Two"}\n')
    return folder


# Table


def test_table(cli: Cli, saved: Path) -> None:
    status, out, _ = cli("table", saved, "--top", 2)
    assert status == 0
    assert out.splitlines()[0] == "x: One"
    assert "2 of 12 completions. p is exact" in out
    assert "x: Two" not in out
    expected = Posterior.from_pretrained(saved).table({"x": "One"}, top=2)
    status, out, _ = cli("table", saved, "--top", 2, "--json")
    assert json.loads(out) == {"row": {"x": "One"}, **expected.to_dict()}
    status, out, _ = cli("table", saved, "--limit", 1, "-n", 20, "--column", "x=Two")
    assert "20 draws of q found" in out
    assert cli("table", saved, "--top", 0)[2] == "amortlm: --top must be at least 1, got 0\n"


# Chains


@pytest.fixture
def wide(embedded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A posterior whose support is not enumerated, and whose weights may not be used: chains must run."""
    monkeypatch.setattr(pool, "KHAT", -math.inf)
    monkeypatch.setattr(pool, "REPEATS", math.inf)
    policy = tiny_policy(embedded, "{x}", Support(stop=".", max_tokens=12, allowed_tokens=(" 1", " 2", " 3")))
    Posterior(policy, embedded.log_prob("{z}", given="{x}")).save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"x": "One"}\n{"x": "Two"}\n')
    return tmp_path


@pytest.mark.slow
def test_evaluate_announces_chains_on_a_terminal(
    cli: Cli, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "THIN", 1)
    assert cli("evaluate", wide, "-n", 16)[2] == "", "quiet in a pipe"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, _, err = cli("evaluate", wide, "-n", 16)
    assert status == 0
    assert err.count("Markov chains start, which take most of the time; --quick leaves them out\n") == 1
    assert logging.getLogger("amortlm.inference.truth").handlers == []


def test_evaluate_quickly(cli: Cli, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "_chains", None)
    status, out, _ = cli("evaluate", wide, "-n", 16, "--quick")
    assert status == 0
    assert out.count("chains left out") == 2
    assert "by amortlm evaluate without --quick" in out
    for option in ("--card", "--check"):
        status, _, err = cli("evaluate", wide, "--quick", option)
        assert (status, err) == (2, f"amortlm: {option} needs the whole diagnosis: leave out --quick\n")


# The card


def test_evaluate_writes_the_card(cli: Cli, saved: Path) -> None:
    assert "| verdict |" not in (saved / "README.md").read_text()
    status, out, _ = cli("evaluate", saved, "-n", 32, "--card")
    assert status == 0
    assert f"wrote {saved / 'README.md'}" in out
    text = (saved / "README.md").read_text()
    assert "| verdict |" in text
    assert "x: Two" in text


# Doctor


def test_doctor(cli: Cli) -> None:
    status, out, _ = cli("doctor")
    assert status == 0
    assert f"amortlm {__version__}, torch {torch.__version__}, " in out
    assert "embedded: cpu, float32" in out
    assert "sampling equals scoring (" in out
    status, out, _ = cli("doctor", "embedded", "--json")
    told = json.loads(out)
    assert told["law"]["holds"] is True
    assert 0 <= told["law"]["error"] < 1e-3
    assert told["packages"]["transformers"]
    assert told["sharing"]["packed"] is True


def test_the_law_holds(family_lm: LanguageModel) -> None:
    found = examine_sampling(family_lm)
    assert found.holds
    assert found.error < 1e-4
    assert found.draws >= 2
    assert any(p.abs().sum() > 0 for p in family_lm.model.parameters())


@pytest.mark.parametrize("broken", ["evaluate", "sample"])
def test_the_law_is_found_broken(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Control: log q of one of the two sides is off by 0.01 nats a token."""
    real = getattr(Policy, broken)

    def off(self: Policy, *args: Any, **kwargs: Any) -> Any:
        if broken == "evaluate":
            found = real(self, *args, **kwargs)
            return PolicyLogProbs(found.log_pf + 0.01, found.log_pterm)
        rollouts, found = real(self, *args, **kwargs)
        return rollouts, PolicyLogProbs(found.log_pf + 0.01, found.log_pterm)

    monkeypatch.setattr(Policy, broken, off)
    found = examine_sampling(one_lm)
    assert not found.holds
    assert [f.exact for f in found.findings] == ([False, True] if broken == "evaluate" else [False, False])
    assert found.error == pytest.approx(0.01, abs=1e-4)
    assert "does not equal scoring" in str(found)


def test_doctor_fails_where_the_law_does(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Sampling((laws.Finding("log q", 0.5, False),), 4, 8)
    monkeypatch.setattr("amortlm.cli.commands.doctor.examine_sampling", lambda lm: bad)
    status, out, _ = cli("doctor")
    assert status == 1
    assert (
        "sampling does not equal scoring (4 completions of up to 8 tokens, largest difference 5.0e-01" in out
    )


def test_the_law_check_fits_its_time() -> None:
    for seconds in (1e-4, 0.02, 0.1, 0.5):
        tokens, draws = affordable(seconds, 5.0)
        assert 1 <= tokens <= 8
        assert 1 <= draws <= 8
        assert 2 * draws * (tokens + 2) * seconds <= 5 or (tokens, draws) == (1, 1)


# New


def test_new_writes_a_run(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    status, out, _ = cli("new", file)
    assert status == 0
    assert out.splitlines() == [f"wrote {file}", f"try:  amortlm train {file}"]
    spec = RunSpec.from_yaml(file)
    assert (spec.model, len(spec.rows())) == ("embedded", 2)
    file.write_text("mine")
    status, _, err = cli("new", file)
    assert (status, file.read_text()) == (2, "mine")
    assert "exists, and is not written over: give another name" in err
    assert "write " + str(tmp_path / "mine.yaml") in cli("new", tmp_path / "mine.txt")[2]
    assert "there is no folder" in cli("new", tmp_path / "no" / "mine.yaml")[2]


@pytest.mark.slow
def test_what_new_writes_trains(cli: Cli, tmp_path: Path) -> None:
    cli("new", tmp_path / "mine.yaml")
    settings = ["--set", "max_steps=1", "--set", "num_samples=4"]
    assert cli("train", tmp_path / "mine.yaml", "--output", tmp_path / "out", *settings)[0] == 0
    assert (tmp_path / "out" / "posterior.json").exists()


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(cli: Cli, shell: str) -> None:
    pytest.importorskip("shtab")
    status, out, _ = cli("completion", shell)
    assert status == 0
    assert all(word in out for word in ("train", "--correct", "evaluate"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], {"train"}),
        (["sample", "--cor"], {"--correct"}),
        (["completion", "f"], {"fish"}),
        (["xyz"], set()),
    ],
)
def test_bash_completes(cli: Cli, tmp_path: Path, words: list[str], expected: set[str]) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "amortlm.sh"
    (tmp_path / "mine.yaml").touch()
    script.write_text(cli("completion", "bash")[1])
    asked = " ".join(["amortlm", *words])
    program = (
        f"source {script}; f=$(complete -p amortlm | sed 's/.*-F \\([^ ]*\\) .*/\\1/');"
        f"COMP_WORDS=({asked}); COMP_CWORD={len(words)}; COMP_LINE='{asked}'; $f amortlm {words[-1]} x;"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert {word.strip() for word in found.stdout.split()} == expected
