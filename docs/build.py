"""Build the documentation: `make docs`, or `python docs/build.py` (extra `[docs]`), into site/.

The pages are README.md, those of docs/, and every page, notebook and picture of the repository that these link to.
With the style sheet docs/site.css they are copied to build/pages at the paths that they have in the repository, so that
a link that works on a page in the repository works on the site, too. A notebook becomes a Markdown page beside it, and
links to it lead to that page. Settings and navigation: zensical.toml.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "pages"  # docs_dir of zensical.toml
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2`*~*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
TO_NOTEBOOK = re.compile(r"(\]\((?![a-z]+:)[^()\s]+)\.ipynb(?=[#)])")
NOTEBOOK = ".ipynb"


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of the relative links and pictures of a page; the path of a link within the page is empty."""
    text = FENCED.sub("", text_of(page))
    found = [unquote(link).partition("#") for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    return [(path, anchor) for path, _, anchor in found]


def text_of(page: Path) -> str:
    """The Markdown of a page; of a notebook, that of its cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != NOTEBOOK:
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def sources() -> list[Path]:
    """The pages and notebooks, what they link to, and the style sheet."""
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found: dict[Path, None] = {ROOT / "docs" / "site.css": None}
    while waiting:
        page = waiting.pop()
        found[page] = None
        linked = [_linked(page, path) for path, _ in links(page) if path]
        found.update(dict.fromkeys(file for file in linked if file.suffix not in (".md", NOTEBOOK)))
        waiting += [file for file in linked if file.suffix in (".md", NOTEBOOK) and file not in found]
    return list(found)


def _linked(page: Path, path: str) -> Path:
    file = (page.parent / path).resolve()
    if not file.is_file():
        raise SystemExit(f"{page.relative_to(ROOT)}: the link {path} leads nowhere")
    return file


def stage(file: Path, copy: Path) -> None:
    """Copy a page or what it links to. Beside the copy of a notebook stands its page, with the pictures in a folder."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)
    if file.suffix == NOTEBOOK:
        copy = _converted(file, copy.parent)
    if copy.suffix == ".md":
        copy.write_text(TO_NOTEBOOK.sub(r"\1.md", copy.read_text(encoding="utf-8")), encoding="utf-8")


def _converted(notebook: Path, folder: Path) -> Path:
    from nbconvert import MarkdownExporter
    from nbconvert.writers import FilesWriter

    own = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    text, resources = MarkdownExporter().from_filename(str(notebook), own)
    return Path(FilesWriter(build_directory=str(folder)).write(text, resources, notebook.stem))


def main() -> int:
    """Returns the exit status of zensical. Links that lead nowhere, and warnings, are errors."""
    if not all(map(find_spec, ("zensical", "mkdocstrings_handlers", "nbconvert"))):
        raise SystemExit(
            "the documentation needs zensical, mkdocstrings, nbconvert: pip install -e '.[docs]'"
        )
    shutil.rmtree(STAGED, ignore_errors=True)
    for file in sources():
        stage(file, STAGED / file.relative_to(ROOT))
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(build, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
