"""Run the notebooks anew, in place: `make notebooks`, or `python notebooks/execute.py [FILE.ipynb ...]`.

Needs the extra `[notebooks]`. What stays in a file are cells and outputs, no times and no versions of the machine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells, in place, in a kernel of their own that starts in `folder`. Raises CellExecutionError."""
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=place
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()


def main(names: list[str]) -> None:
    for file in [Path(name) for name in names] or sorted(HERE.glob("*.ipynb")):
        notebook, start = nbformat.read(file, as_version=4), time.monotonic()
        execute(notebook, file.parent)
        nbformat.write(notebook, file)
        print(f"{file.name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
