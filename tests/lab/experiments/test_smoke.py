"""The experiments, from the command to the report, with their smoke presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amortlm.cli import main
from amortlm.errors import ConfigError
from amortlm.lab.experiments import EXPERIMENTS, load_experiment


def test_an_unknown_experiment() -> None:
    with pytest.raises(ConfigError, match="did you mean 'numbers'"):
        load_experiment("number")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name: str, tmp_path: Path) -> None:
    """Every experiment from the command to its report, and nothing to do the second time."""
    argv = ["reproduce", name, "--preset", "smoke", "--output", str(tmp_path)]
    assert main(argv) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    experiment = load_experiment(name)
    assert list(results["runs"]) == list(experiment.methods)
    for found in results["runs"].values():
        assert set(found[0]["metrics"]) == set(experiment.metrics)
    assert list(tmp_path.glob("*.png"))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert main(argv) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()} == made


@pytest.mark.slow
def test_the_paper_preset_builds_every_method(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On the embedded model, up to the first step. The other experiments need data, numbers has its own test."""
    argv = ["reproduce", "arithmetic", "--preset", "paper", "--model", "embedded", "--dry-run"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    printed, err = capfd.readouterr()
    assert printed.splitlines() == [f"{method}: ok" for method in load_experiment("arithmetic").methods]
    assert err == ""
