"""Training that stops when it is right, and a certificate that a later check confirms or refutes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Posterior, Support
from amortlm.cli import main
from amortlm.diagnostics import certificate as module
from amortlm.diagnostics.certificate import (
    Certificate,
    check,
    hash_adapter,
    hash_rows,
    look_level,
    samples_for,
)
from amortlm.engine.adapter import default_lora
from amortlm.errors import CheckpointError, ConfigError

ROWS = [{"x": "the dog"}, {"x": "a"}]
MARK, STEPS = 0.1, 150


def make_trainer(lm: LanguageModel, folder: Path, **settings: Any) -> GFNTrainer:
    """One word of four after a prompt: learnt in a few updates."""
    config = {
        "objective": "vargrad",
        "max_steps": STEPS,
        "num_samples": 32,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "behaviour": {"tempered": 0.5},
        "diagnose_steps": 5,
        "stop_at_gap": MARK,
        "save_strategy": "no",
        "use_cpu": True,
        **settings,
    }
    return GFNTrainer(
        lm,
        target=lm.log_prob("{z}", given="{x}") / 2.0,
        prompt="{x}",
        support=Support(stop=".", min_tokens=1, max_tokens=2, allowed_tokens=(" a", " cat", " dog", "s")),
        train_dataset=ROWS,
        adapter=default_lora(4),
        args=GFNConfig(output_dir=str(folder), **config),
    )


@pytest.fixture(scope="module")
def stopped(models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has stopped, with the rows and the model beside it as the command line has them."""
    root = tmp_path_factory.mktemp("certified")
    lm = models["llama-untied"]
    lm.model.save_pretrained(root / "model")
    lm.tokenizer.save_pretrained(root / "model")
    spec = {
        "model": str(root / "model"), "prompt": "{x}", "data": ROWS, "adapter": 4,
        "target": [{"log_prob": {"of": "{z}", "given": "{x}"}, "temperature": 2.0}],
        "support": {"stop": ".", "max_tokens": 2, "allowed_tokens": [" a", " cat", " dog", "s"]},
        "config": {
            "objective": "vargrad", "max_steps": STEPS, "num_samples": 32, "per_device_train_batch_size": 2,
            "learning_rate": 2e-2, "lr_scheduler_type": "constant", "behaviour": {"tempered": 0.5}, "diagnose_steps": 5,
            "stop_at_gap": "1e-1", "save_strategy": "no", "use_cpu": True,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(spec))
    assert main(["train", str(root / "run.yaml"), "--output", str(root / "out")]) == 0
    return root / "out"


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def exact_gap(posterior: Posterior) -> float:
    return max(row.gap for row in posterior.diagnose(ROWS, n=30).rows)


def checked(folder: Path, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit status of `amortlm evaluate --check` and its one line."""
    capfd.readouterr()
    status = main(["evaluate", str(folder), "--check", *options])
    out, err = capfd.readouterr()
    assert (out == "") == (status != 0)
    line = out or err
    assert line.count("\n") == 1, line
    return status, line


def change_adapter(folder: Path, scale: float) -> None:
    file = folder / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({k: v + scale * torch.randn_like(v) for k, v in load_file(file).items()}, str(file))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Stopping


def test_training_stops_when_it_is_right(stopped: Path) -> None:
    found = Certificate.load(stopped)
    assert found.step < STEPS
    assert found.step % 5 == 0
    assert found.reached <= found.mark == MARK
    posterior = Posterior.from_pretrained(stopped)
    assert exact_gap(posterior) == pytest.approx(found.reached, abs=1e-4), (
        "the adapter saved is the one measured"
    )
    assert found.rows == ROWS
    assert [len(gold) > 0 for gold in found.gold] == [True, True], "the buffer's best"
    assert (found.data_hash, found.adapter_hash) == (hash_rows(ROWS), hash_adapter(stopped))
    assert found.target == json.loads((stopped / "posterior.json").read_text())["target"]
    assert found.versions["torch"] == torch.__version__
    assert found.reports[0]["khat"] is None or math.isfinite(found.reports[0]["khat"])


def test_training_goes_on_while_it_is_not(one_lm: LanguageModel, tmp_path: Path) -> None:
    """A mark out of reach; the certificate of an earlier run in the folder goes."""
    (tmp_path / module.FILE).write_text("{}")
    trainer = make_trainer(one_lm, tmp_path, stop_at_gap=1e-9, max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 10
    assert not (tmp_path / module.FILE).exists()
    with pytest.raises(CheckpointError, match="stop_at_gap writes it"):
        Certificate.load(tmp_path)


@pytest.mark.slow
def test_sampled_gaps_stop_it_too(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without enumeration: at the stop the true gap is below the mark, and checks do not cry wolf."""
    monkeypatch.setattr(module, "LIMIT", 0)
    trainer = make_trainer(one_lm, tmp_path)
    trainer.train()
    assert trainer.state.global_step < STEPS
    found = Certificate.load(tmp_path)
    assert {r["truth"] for r in found.reports} <= {"sir", "mcmc"}
    assert exact_gap(trainer.posterior) < found.reached <= MARK
    assert all(check(trainer.policy, trainer.posterior.target, found, seed=seed).holds for seed in range(3))
    trainer.policy.load_adapter(tmp_path)
    for name, p in trainer.policy.named_parameters():
        if "lora_B" in name:
            p.data += 0.3 * torch.randn_like(p)
    assert exact_gap(trainer.posterior) > 2 * MARK
    assert not check(trainer.policy, trainer.posterior.target, found).holds


def test_looking_often_shares_the_level() -> None:
    assert sum(1 - look_level(k, 0.99) for k in range(1, 10_000)) <= 0.01
    assert look_level(1, 0.99) == pytest.approx(0.995)
    assert [samples_for(mark) for mark in (1.0, 0.1, 0.001)] == [256, 400, 4096]


@pytest.mark.parametrize("settings", [{"stop_at_gap": -1.0}, {"stop_at_gap": 0.1, "diagnose_steps": 0}])
def test_settings_that_cannot_stop(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="stop_at_gap"):
        GFNConfig(**settings)


# Checking


def test_a_certificate_holds(stopped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in ("0", "1"):
        status, line = checked(stopped, capfd, "--seed", seed)
        assert (status, line[:18]) == (0, "certificate holds:")


def test_a_changed_adapter_is_refuted_and_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_adapter(folder, 0.3)
    status, line = checked(folder, capfd)
    assert status == 1
    assert line.startswith("amortlm: certificate does not hold: gap of row")
    assert "the adapter is not the one that was certified" in line


def test_an_adapter_changed_for_no_worse_holds(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_adapter(folder, 1e-5)
    assert checked(folder, capfd)[0] == 0


def test_a_torn_adapter_cannot_be_checked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    status, line = checked(folder, capfd)
    assert status == 2
    assert "the save is incomplete" in line


@pytest.mark.parametrize("what", ["target", "support", "prompt", "data"])
def test_what_changed_is_told_apart(folder: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    spec = json.loads((folder / "posterior.json").read_text())
    if what == "target":
        edit(folder / "posterior.json", target=[{"log_prob": {"of": "{z}", "given": "{x}"}}])
    elif what == "support":
        edit(folder / "posterior.json", support={**spec["support"], "max_tokens": 3})
    elif what == "prompt":
        edit(folder / "posterior.json", prompt="a {x}")
    else:
        (folder / "rows.jsonl").write_text(json.dumps({"x": "a cat"}) + "\n")
    status, line = checked(folder, capfd)
    assert status == 1
    assert f"certificate does not apply: {what} changed" in line


def test_another_model_behind_the_same_target(folder: Path, models: dict[str, LanguageModel]) -> None:
    lm = models["gpt2-tied"]
    posterior = Posterior.from_pretrained(folder)
    posterior.target = (lm.log_prob("{z}", given="{x}") / 2.0).bind(lm)
    found = check(
        posterior.policy, posterior.target, Certificate.load(folder), adapter_hash=hash_adapter(folder)
    )
    assert not found.holds
    assert "another model or verifier" in found.line


@pytest.mark.parametrize("text", ["", "{}", '{"format": 9}', "[]"])
def test_a_damaged_certificate(folder: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    (folder / module.FILE).write_text(text)
    status, line = checked(folder, capfd)
    assert status == 2
    assert "certificate.json is missing or damaged" in line


def test_nan_is_no_small_gap(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_adapter(folder, math.nan)
    assert checked(folder, capfd)[0] != 0
