"""`python -m amortlm_vllm` on the stand-in for vLLM: a program for the tests of what starts servers."""

from __future__ import annotations

import sys
from pathlib import Path

from fake_vllm import modules


def program(folder: Path) -> str:
    """The path of a program that takes the arguments of an interpreter that has vLLM."""
    file, wheel = folder / "python", Path(__file__).parents[2] / "servers" / "vllm" / "src"
    file.write_text(f'#!/bin/sh\nPYTHONPATH={wheel}:$PYTHONPATH exec {sys.executable} {__file__} "$@"\n')
    file.chmod(0o755)
    return str(file)


if __name__ == "__main__":
    sys.modules.update(modules())
    del sys.argv[1:3]  # -m amortlm_vllm
    from amortlm_vllm.__main__ import main

    main()
