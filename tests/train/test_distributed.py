"""Two processes do what one does, and end together: the same script in several processes, gloo on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import UPDATES

WORKER = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
BOUND = 240  # seconds; hours if processes wait for each other for ever


def torchrun(folder: Path, processes: int, prompts: int, what: str) -> dict[str, torch.Tensor]:
    """What the worker found."""
    folder.mkdir()
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(WORKER), str(folder), str(prompts), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "result.pt", weights_only=True)


def two(folder: Path, what: str, waits_for: tuple[int, ...] = (0, 1)) -> list[tuple[int | None, str]]:
    """Exit status and stderr of two processes that nothing watches over, as torchrun would: each must end by itself."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), "2", what],
            env={**os.environ, **world, "OMP_NUM_THREADS": "1", "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=(folder.parent / f"{what}-{i}.txt").open("w"),
        )
        for i in range(2)
    ]
    try:
        for i in waits_for:
            processes[i].wait(timeout=BOUND)
        return [(p.poll(), (folder.parent / f"{what}-{i}.txt").read_text()) for i, p in enumerate(processes)]
    finally:
        for p in processes:
            p.kill()
            p.wait()


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(tmp_path: Path) -> None:
    one = torchrun(tmp_path / "one", 1, 4, "updates")
    both = torchrun(tmp_path / "two", 2, 2, "updates")
    half = torchrun(tmp_path / "half", 1, 2, "updates")
    assert (one["world"], both["world"]) == (1, 2)
    for name in UPDATES:
        torch.testing.assert_close(both[name], one[name], atol=1e-6, rtol=1e-5)
        # The control: half the batch makes another update.
        assert not torch.allclose(half[name], one[name], atol=1e-6, rtol=1e-5), name


@pytest.mark.slow
def test_two_processes_through_diagnosis_saving_death_and_resume(tmp_path: Path) -> None:
    """Past 60 updates with diagnosis at logging steps; one is killed, the other says so; resumed, all is the same to
    the bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for status, stderr in two(whole, "run"):
        assert status == 0, stderr[-2000:]
    (status, stderr), (killed, _) = two(cut, "dies")
    assert (status, killed) == (1, -9)
    # A collective that was under way names no process, a barrier does.
    assert re.search("process 0 of 2 ends: (process 1|another process) stopped", stderr), stderr[-2000:]
    assert not (cut / "adapter_model.safetensors").exists()
    # A checkpoint that lacks a process's part is passed over, however new.
    shutil.copytree(cut / "checkpoint-45", cut / "checkpoint-46")
    (cut / "checkpoint-46" / "process-1" / "buffer.json").unlink()
    for status, stderr in two(cut, "resume"):
        assert status == 0, stderr[-2000:]
    assert (cut / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()
    assert histories(cut) == histories(whole)
    logged = [entry["step"] for entry in histories(whole) if "loss" in entry]
    assert logged == list(range(5, 65, 5))
    assert [entry["step"] for entry in histories(whole) if "ess" in entry] == [0, 25, 50]
    looks = [json.loads(line) for line in (whole / "looks.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [step for step in (0, 25, 50, 64) for _ in range(4)]


def histories(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "checkpoint-64" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_a_late_process_ends_the_others(tmp_path: Path) -> None:
    (status, stderr), (still, _) = two(tmp_path / "late", "late", waits_for=(0,))
    assert (status, still) == (1, None)
    assert "process 0 of 2 ends: process 1 stopped, or was more than ddp_timeout=10 seconds late" in stderr
