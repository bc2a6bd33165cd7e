"""Two processes do what one does: the same script under torchrun, gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(folder: Path, processes: int, prompts: int, objective: str) -> dict[str, Any]:
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(WORKER), str(folder), str(prompts), objective]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["subtb", "vargrad"])
def test_two_processes_make_the_update_of_one(tmp_path: Path, objective: str) -> None:
    one = run(tmp_path / "one", 1, 4, objective)
    two = run(tmp_path / "two", 2, 2, objective)
    assert (one["world"], two["world"]) == (1, 2)
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-6, rtol=1e-5)
    # The control: half the batch makes another update.
    half = run(tmp_path / "half", 1, 2, objective)
    assert not torch.allclose(half["weights"], one["weights"], atol=1e-6, rtol=1e-5)
