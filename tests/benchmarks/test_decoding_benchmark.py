"""The benchmark of decoding at toy size: every part gives its figures, and none is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decoding


@pytest.mark.slow
def test_every_part_gives_figures(tmp_path: Path) -> None:
    case = decoding.Case("tiny", 3, 4, "cpu", "bfloat16", 0.1)
    found = dict(decoding.parts(case, str(tmp_path)))
    assert not [figures["note"] for figures in found.values() if "note" in figures]
    drawn = ("ordinary", "static", "generate", "generate, static", "GRPO (TRL)")
    for name in drawn:
        assert all(found[name][figure] > 0 for figure in ("tokens/s", "bandwidth", "matmul")), name
    for name in ("update, ordinary", "update, static"):
        assert found[name]["updates/s"] > 0
    for name in ("exactness, ordinary", "exactness, static"):
        assert found[name]["token, evaluate, max"] < 0.3  # the tolerance of bfloat16
        assert (
            found[name]["token, float32, mean"] > 1e-5
        )  # bfloat16 rounds: what it is compared with is another model
    assert set(found) == {*drawn, "ceilings"} | {
        f"{what}, {which}" for what in ("update", "exactness") for which in ("ordinary", "static")
    }


def test_an_error_is_a_figure(tmp_path: Path) -> None:
    case = decoding.Case("tiny", 2, 2, "cpu", "float32", 0.1)
    with decoding._figures(case) as found:
        raise ValueError("why")
    assert found == {"note": "ValueError: why"}
    (tmp_path / "results.jsonl").write_text(json.dumps({"shape": "tiny", "part": "static", **found}) + "\n")
    assert "ValueError: why" in decoding.write_table(tmp_path)
    assert "static" in (tmp_path / "table.md").read_text()
