"""docs/models.md: grouped by what a reader wants to know, as its benchmark writes it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from benchmarks.architectures import COLUMNS, GROUPS, Row

from benchmarks import architectures

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROWS: list[Row] = [
    ("a", "exact", "whole texts", ""),
    ("b", "refused", "", "not causal"),
    ("c", "exact", "shared prompts: sampling, scoring", ""),
    ("d", "wrong", "whole texts", "gradient: "),
    ("e", "exact", "shared prompts: sampling, whole texts for scoring", ""),
]


def listed(text: str) -> dict[str, list[str]]:
    """The models of each section that has a table."""
    found = {}
    for section in text.split("\n## ")[1:]:
        names = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
        if names:
            assert names.pop(0) == "model"
            found[section.splitlines()[0]] = [name for name in names if not name.startswith("---")]
    return found


def test_models_are_grouped_by_result() -> None:
    groups = architectures.grouped(ROWS)
    titles = [GROUPS[name][0] for name in ("fast", "whole", "refused", "other")]
    assert listed(f"\n{architectures.tables(groups)}") == dict(
        zip(titles, (["c"], ["a", "e"], ["b"], ["d"]), strict=True)
    )
    assert (
        architectures.contents(groups).splitlines()[1]
        == "- [Exact, with whole texts](#exact-with-whole-texts): 2 variants"
    )
    assert list(architectures.grouped(ROWS[:1])) == ["whole"]
    assert all(set(columns) <= set(COLUMNS) for _, _, columns in GROUPS.values())


def test_the_page_has_every_variant_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = listed(text)
    assert list(sections) == [title for title, _, _ in GROUPS.values()]
    counts = re.findall(r"^- \[(.+)\]\(#.+\): (\d+) variants$", text, re.MULTILINE)
    assert counts == [(title, str(len(names))) for title, names in sections.items()]
    names = Counter(name for found in sections.values() for name in found)
    assert set(names.values()) == {1}
    assert f"The tables have {len(names)} variants" in text
