"""Stories of a file as rows of the infilling experiment."""

from __future__ import annotations

from pathlib import Path

from amortlm.lab.tasks.infilling import read_stories

TOKENISED = "roads\tjames was lost . it was late , he thought . he asked : where am i ? a man came . it ended well .\n"


def test_white_space_before_punctuation_is_removed(tmp_path: Path) -> None:
    """The stop symbol is ".", and " ." would be another token, which a completion may contain."""
    file = tmp_path / "stories.tsv"
    file.write_text(TOKENISED + "two\tOne is short. Two too.\n", encoding="utf-8")
    x = "james was lost. it was late, he thought. he asked: where am i?"
    assert read_stories(file) == [{"x": x, "gold": " a man came.", "y": "it ended well."}]


def test_plain_text_stays(tmp_path: Path) -> None:
    file = tmp_path / "tales.txt"
    file.write_text(
        "Once upon a time, Sue ran. She fell! Did it hurt? It did not. She ran on.", encoding="utf-8"
    )
    (row,) = read_stories(file)
    assert row == {
        "x": "Once upon a time, Sue ran. She fell! Did it hurt?",
        "gold": " It did not.",
        "y": "She ran on.",
    }
