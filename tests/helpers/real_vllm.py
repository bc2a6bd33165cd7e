"""Servers on the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
