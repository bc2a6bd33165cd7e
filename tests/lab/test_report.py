"""Parts of the report: figures over seeds, and files that are whole or absent."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from amortlm.environment import environment
from amortlm.lab import compare, report, store


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    store.write_json(file, {"a": 1})

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as f:
            f.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        store.write_json(file, {"a": 2})
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
    store.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert "[ 1, 2.5, -1e-09, null, true ]" in text
    assert '{ "passes": 2, "a  b": -0.5, "fail": null }' in text
    assert '"x": "two  spaces",\n' in text, "words keep their lines"


def test_spread_leaves_out_what_is_not_finite() -> None:
    assert report.spread([1.0, None, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5)}
    assert report.spread([4.0]) == {"mean": 4.0, "sd": None}


def test_pairs_are_compared_on_the_examples_they_share() -> None:
    """Means over seeds first; a pair that is not finished, or saw other examples, has no line."""
    seen = {"a": [[1.0, 2.0, 4.0], [3.0, 2.0, 4.0]], "b": [[1.0, 1.0, 1.0]], "c": [[0.0]]}
    runs = {m: [{"records": {"s": v}} for v in of] for m, of in seen.items()}
    pairs = [("a", "b"), ("a", "c"), ("a", "missing"), ("b", "a")]
    text = compare.paired_table(compare.paired_digest(runs, pairs, ["s"]), {"s": "score"}, "rows")
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["difference", "metric", "mean", "95 % interval", "p (sign flips)", "rows"]
    assert [line[:3] for line in lines[2:]] == [["a − b", "score", "+1.67"], ["b − a", "score", "-1.67"]]
    assert lines[2][-1] == "3"
    assert compare.paired_table(compare.paired_digest(runs, pairs[1:3], ["s"]), {"s": "score"}, "rows") == ""


def test_a_bar_within_a_name_ends_no_cell() -> None:
    text = report.grid(["", "KL(q||p)"], [["log p(z|x)", 1]])
    header, _, line = text.splitlines()
    assert len(re.findall(r"(?<!\\)\|", header)) == len(re.findall(r"(?<!\\)\|", line)) == 3
    assert r"KL(q\|\|p)" in header
    assert "KL(q||p)" in report.grid(["", "KL(q||p)"], [["a", 1]], "simple")


def test_the_commit_of_the_source_tree() -> None:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if git.returncode:
        pytest.skip("no checkout")
    assert environment()["commit"].removesuffix("+") == git.stdout[:12]
