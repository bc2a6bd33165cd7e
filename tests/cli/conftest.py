"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amortlm.cli import main


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: (exit status, what it printed, what it printed to stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(a) for a in argv])
        return status, *capfd.readouterr()

    return run
