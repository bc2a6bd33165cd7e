"""Servers on the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Support

PYTHON = os.environ.get("AMORTLM_VLLM_PYTHON")
PROGRAM = ("-m", "amortlm_vllm")


@contextmanager
def served(folder: str | Path, *options: str, program: Sequence[str] = PROGRAM) -> Iterator[str]:
    """The address of a server in float32. program: what the interpreter runs."""
    command = [str(PYTHON), *program, str(folder), "--dtype", "float32", "--port", "0", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said, found = [], threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving "):
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert found.wait(600)
        address = [m[0] for line in said if (m := re.search(r"(?<=at )http://\S+", line))]
        assert address, "".join(said)
        yield address[0]
    finally:
        process.terminate()
        process.wait(60)


def check_training(lm: LanguageModel, url: str, folder: Path, lag: int, **extra: Any) -> None:
    """Training with completions of a server leads from a total variation above .5 to one below .1, with weights that are
    new, or `lag` updates old. extra: for the trainer."""
    trainer = make_trainer(
        lm,
        folder,
        target=lm.log_prob("{z}{y}", given="{x}") * 2.0,
        support=Support(
            stop=".", min_tokens=1, max_tokens=2, allowed_tokens=["a", "b", "at", " cat", " dog"]
        ),
        rows=ROWS[:2],
        max_steps=80,
        num_samples=32,
        warmup_steps=5,
        epsilon=0.1,
        rollout=url,
        max_staleness=lag,
        **extra,
    )
    before = trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation")
    trainer.train()
    after = trainer.posterior.diagnose(ROWS[:2], 32).mean("total_variation")
    assert before > 0.5, before
    assert after < 0.1, after
    mismatch = [e["sampler_mismatch"] for e in trainer.state.log_history if "sampler_mismatch" in e]
    assert (max(mismatch) < 1e-3) == (lag == 0)
