"""Without genlm-control the bridge says how to get it."""

from __future__ import annotations

import importlib
import sys

import pytest

from amortlm.errors import MissingExtraError


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "genlm" or n.startswith("genlm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "genlm", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "amortlm.interop.genlm", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'amortlm\[genlm\]'"):
        importlib.import_module("amortlm.interop.genlm")
