"""The notebooks as they stand here: run from their first cell to their last, without an error, on nobody's machine.

`make notebooks` runs them anew.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

FILES = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes


def cells(file: Path) -> list[dict[str, Any]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["nbformat"] == 4
    assert found["metadata"]["kernelspec"]["name"] == "python3"
    return list(found["cells"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_was_run_in_order(file: Path) -> None:
    code = [cell for cell in cells(file) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for cell in code for output in cell["outputs"])
    for cell in code:
        source = "".join(cell["source"])
        assert cell["outputs"] or not re.search(r"print\(|plt\.show", source), source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_small_and_names_no_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"/(tmp|home|root|work|usr)/", text)
    assert all(not cell["metadata"] for cell in cells(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pictures_are_pictures_and_links_lead_somewhere(file: Path) -> None:
    outputs = [output for cell in cells(file) for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture)[:4] == b"\x89PNG" for picture in pictures)
    text = "".join("".join(cell["source"]) for cell in cells(file) if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (file.parent / link).exists(), link


def test_there_are_notebooks() -> None:
    assert {file.stem for file in FILES} >= {"posterior_in_ten_minutes", "constrained_generation"}
