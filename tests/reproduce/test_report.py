"""Parts of the report: figures over seeds, and files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amortlm.reproduce import report, storage


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    storage.write_json(file, {"a": 1})

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as f:
            f.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_numbers_stand_on_one_line(tmp_path: Path) -> None:
    value = {
        "a": [1, 2.5, -1e-9, None, True],
        "point": {"passes": 2, "a  b": -0.5, "fail": None},
        "text": "[\n1,\n2\n]",
        "mixed": ["[\n", 1],
        "words": {"x": "two  spaces", "y": 1},
        "deep": [[1], [], {}],
    }
    storage.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert "[ 1, 2.5, -1e-09, null, true ]" in text
    assert '{ "passes": 2, "a  b": -0.5, "fail": null }' in text
    assert '"x": "two  spaces",\n' in text, "words keep their lines"


def test_spread_leaves_out_what_is_not_finite() -> None:
    assert report.spread([1.0, None, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5)}
    assert report.spread([4.0]) == {"mean": 4.0, "sd": None}
