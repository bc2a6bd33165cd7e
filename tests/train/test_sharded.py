"""Sharded models (FSDP2) in two processes do what whole ones do in one: gloo on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_worker import REFUSED, ROWS, UPDATES, model

from amortlm import Posterior

WORKER = Path(__file__).parents[1] / "helpers" / "sharded_worker.py"
# As `accelerate launch --use_fsdp --fsdp_version 2` tells its processes.
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
BOUND = 240  # seconds; hours if processes wait for each other for ever
ROUNDING = {"atol": 1e-6, "rtol": 1e-5}


def start(
    folder: Path, what: str, layout: str = "sharded", processes: int = 2, prompts: int = 2, waits_for: int = 2
) -> list[tuple[int | None, str]]:
    """Exit status and stderr of processes that nothing watches over."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} | (LAUNCHED if layout == "launched" else {})
    stderr = [folder.parent / f"{folder.name}-{what}-{i}.txt" for i in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(prompts), layout, what],
            env={**os.environ, **(world | {"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {})},
            stdout=subprocess.DEVNULL,
            stderr=file.open("w"),
        )
        for i, file in enumerate(stderr)
    ]
    try:
        for p in started[:waits_for]:
            p.wait(timeout=BOUND)
        return [(p.poll(), file.read_text()) for p, file in zip(started, stderr, strict=True)]
    finally:
        for p in started:
            p.kill()
            p.wait()


def finish(folder: Path, what: str, *args: Any, **kwargs: Any) -> None:
    for status, stderr in start(folder, what, *args, **kwargs):
        assert status == 0, stderr[-2000:]


def result(folder: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
    finish(folder, "updates", *args, **kwargs)
    return torch.load(folder / "result.pt", weights_only=True)


def draws(folder: Path, tied: bool) -> list[tuple[str, float]]:
    posterior = Posterior.from_pretrained(folder, lm=model(tied))
    return [(s.text, s.log_q) for row in ROWS for s in posterior.sample(row, 8)]


@pytest.mark.slow
def test_sharded_updates_and_draws_are_those_of_one_process(tmp_path: Path) -> None:
    one = result(tmp_path / "one", "whole", 1, 4)
    both = result(tmp_path / "two", "launched")
    half = result(tmp_path / "half", "whole", 1, 2)
    assert (one["joined"], half["joined"]) == (0, 0)
    assert both["joined"] > 100  # passes for the process with longer completions
    for name in UPDATES:
        assert one[f"{name}.held"] == 1
        assert 0.45 < both[f"{name}.held"] < 0.55
        assert both[f"{name}.texts"] == one[f"{name}.texts"]
        torch.testing.assert_close(both[f"{name}.logs"], one[f"{name}.logs"], **ROUNDING)
        torch.testing.assert_close(both[name], one[name], **ROUNDING)
        # The control: half the batch makes another update.
        assert not torch.allclose(half[name], one[name], **ROUNDING), name
    for name in ("lora", "full"):
        of_both, of_one = (draws(tmp_path / folder / name, name == "full") for folder in ("two", "one"))
        assert [text for text, _ in of_both] == [text for text, _ in of_one]
        assert [q for _, q in of_both] == pytest.approx([q for _, q in of_one], abs=1e-4)


@pytest.mark.slow
def test_a_sharded_run_through_diagnosis_death_and_resume(tmp_path: Path) -> None:
    """As two processes with whole models, over eight updates; one is killed, and the other says so; resumed, all is the
    same to the bit."""
    ddp, whole, cut = tmp_path / "ddp", tmp_path / "whole", tmp_path / "cut"
    finish(ddp, "run", "whole")
    finish(whole, "run")
    adapter = load_file(whole / "adapter_model.safetensors")
    assert_close(adapter, load_file(ddp / "adapter_model.safetensors"))
    initial = load_file(ddp / "checkpoint-2" / "adapter_model.safetensors")
    assert not torch.allclose(adapter[(name := next(iter(adapter)))], initial[name], atol=1e-3)  # the control
    (status, stderr), (killed, _) = start(cut, "dies")
    assert (status, killed) == (1, -9)
    assert "process 0 of 2 ends: another process stopped" in stderr, stderr[-2000:]
    shutil.rmtree(cut / "best")
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-5")
    (cut / "checkpoint-5" / "process-1" / "optimizer.pt").unlink()  # passed over, however new
    finish(cut, "resume")
    assert same(cut, whole, "adapter_model.safetensors")
    assert same(cut, whole, "README.md")
    assert histories(cut) == histories(whole)


@pytest.mark.slow
@pytest.mark.long
def test_all_weights_resume_too(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(whole, "full")
    shutil.copytree(whole, cut)
    for name in ("posterior.json", "model.safetensors"):
        (cut / name).unlink()
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(cut / name)
    finish(cut, "full-resume")
    assert same(cut, whole, "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-4)


def same(a: Path, b: Path, name: str) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()


def histories(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
@pytest.mark.long
def test_a_late_process_ends_the_others(tmp_path: Path) -> None:
    (status, stderr), (still, _) = start(tmp_path / "late", "late", waits_for=1)
    assert (status, still) == (1, None)
    assert "another process stopped, or was more than ddp_timeout=10 seconds late" in stderr, stderr[-2000:]


@pytest.mark.slow
def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    finish(tmp_path / "refused", "refusals")
    found = json.loads((tmp_path / "refused" / "refusals.json").read_text())
    said = {
        "version": "version 1 is not supported",
        "reshard": "leave out reshard_after_forward=False",
        "offload": "leave out cpu_offload",
        "checkpointing": "activation_checkpointing=True of GFNConfig does the same",
        "size": "leave out auto_wrap_policy by size",
        "class": "transformer_layer_cls_to_wrap names Layer, which is not the class",
        "pissa": "train plain LoRA",
        "weights": "the processes have loaded different weights",
        "twice": "is sharded for the policy of another trainer: load the model again",
    }
    assert said.keys() == REFUSED.keys() | {"weights", "twice"}
    for name, sentence in said.items():
        assert sentence in found[name]
