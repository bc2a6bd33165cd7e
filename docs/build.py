"""Build the documentation: `make docs`, or `python docs/build.py` (extra `[docs]`), into site/.

The pages are README.md, those of docs/, and every page and picture of the repository that these link to. With the style
sheet docs/site.css they are copied to build/pages at the paths that they have in the repository, so that a link that
works on a page in the repository works on the site, too. Settings and navigation: zensical.toml.
"""

from __future__ import annotations

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


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of the relative links and pictures of a page; the path of a link within the page is empty."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = [unquote(link).partition("#") for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    return [(path, anchor) for path, _, anchor in found]


def sources() -> list[Path]:
    """The pages, what they link to, and the style sheet."""
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found: dict[Path, None] = {ROOT / "docs" / "site.css": None}
    while waiting:
        page = waiting.pop()
        found[page] = None
        linked = [_linked(page, path) for path, _ in links(page) if path]
        found.update(dict.fromkeys(file for file in linked if file.suffix != ".md"))
        waiting += [file for file in linked if file.suffix == ".md" and file not in found]
    return list(found)


def _linked(page: Path, path: str) -> Path:
    file = (page.parent / path).resolve()
    if not file.is_file():
        raise SystemExit(f"{page.relative_to(ROOT)}: the link {path} leads nowhere")
    return file


def main() -> int:
    """Returns the exit status of zensical. Links that lead nowhere, and warnings, are errors."""
    if find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None:
        raise SystemExit("the documentation needs zensical and mkdocstrings: pip install -e '.[docs]'")
    shutil.rmtree(STAGED, ignore_errors=True)
    for file in sources():
        copy = STAGED / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(build, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
