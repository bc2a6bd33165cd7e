"""Processes that are killed, or told to end: what they leave is gone on from, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "helpers" / "killed_worker.py"
TRAINING = 2.0  # seconds that a worker is let train at most


def start(folder: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A worker that has begun to train."""
    worker = subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), str(folder), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    if (line := worker.stdout.readline()) != "training\n":
        out, err = worker.communicate()
        assert line == "finished\n", line + out + err  # it had been killed after its last step
    return worker


def finish(worker: subprocess.Popen[str]) -> str:
    _, err = worker.communicate()
    assert worker.returncode == 0, err
    return err


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def check_kills(folder: Path, kills: int, seed: int = 0) -> int:
    """Kill a run so often at random moments, let it finish, and compare. Returns how often it was killed in training."""
    finish(start(folder / "whole"))
    times, died = random.Random(seed), 0
    for _ in range(kills):
        worker = start(folder / "killed")
        time.sleep(times.uniform(0, TRAINING))
        worker.kill()
        worker.communicate()
        died += worker.returncode == -signal.SIGKILL
    finish(start(folder / "killed"))
    assert adapter(folder / "killed") == adapter(folder / "whole")
    return died


@pytest.mark.slow
def test_kill_9(tmp_path: Path) -> None:
    assert check_kills(tmp_path, 2) > 0


@pytest.mark.slow
def test_two_processes_end_together_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to their launcher: both finish the step and save. Resumed, they end where uninterrupted ones do."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(start(tmp_path / "whole", "two", launcher=two))
    worker = start(tmp_path / "ended", "two", launcher=two)
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate()
    assert worker.returncode != 0
    assert "SIGTERM: saved" in err, err
    assert not (tmp_path / "ended" / "posterior.json").exists()
    finish(start(tmp_path / "ended", "two", "resume", launcher=two))
    assert adapter(tmp_path / "ended") == adapter(tmp_path / "whole")
