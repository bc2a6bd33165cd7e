"""The pages of the documentation belong together: links, navigation, names and messages; and they build into a site."""

from __future__ import annotations

import ast
import functools
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
from browser import browser, needs_chromium, open_page

import amortlm

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = script("build")


# Links, in the repository


def anchors(page: Path) -> set[str]:
    """Those that the headings of a page get, on the site as on the pages of a forge."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """What is wrong with the relative links of a page."""
    wrong = []
    for path, anchor in build.links(page):
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or not file.is_relative_to(ROOT):
            wrong.append(f"{path}: no such file")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{path}#{anchor}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](#a-title) [b](b.md) [c](#c) `[d](d.md)`\n```\n[e](e.md)\n```\n[f](https://f)\n"
    )
    assert broken_in(page, tmp_path) == ["b.md: no such file", "#c: no such heading"]


def broken_in(page: Path, root: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", root)
        return broken(page)


# Navigation


def navigation(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
        return
    for entry in entries:
        for target in entry.values():
            yield from navigation(target)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(navigation(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    found = [file.relative_to(ROOT) for file in build.sources() if file.suffix in (".md", build.NOTEBOOK)]
    pages = [file.with_suffix(".md").as_posix() for file in found]
    assert sorted(listed) == sorted(pages)


# What pages say about the code


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    described = set(re.findall(r"amortlm\.(\w+)\b", text))
    assert set(amortlm.__all__) - described == {"__version__"}


def literals() -> list[str]:
    """Every text in the source; what an f-string fills in is a gap, "…"."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages() -> list[str]:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    return [
        message
        for line in re.findall(r"^\*\*.*\*\*$", text, re.M)
        for message in re.findall(r"`(.+?)`\*\*", line)
    ]


def is_said(message: str, texts: list[str]) -> bool:
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_error_messages_are_those_of_the_source() -> None:
    messages, texts = quoted_messages(), literals()
    assert len(messages) > 30
    assert [message for message in messages if not is_said(message, texts)] == []
    assert not is_said("fp16 needs a CPU", texts)


# Docstrings as Markdown


def test_docstrings_become_lists() -> None:
    pytest.importorskip("griffe", reason="needs the extra 'docs'")
    text = "A sampler of [B, T].\n\nn    [B] draws\n     of it\nseed, x  a `[1]`\n\nrow: the row\n\n    q * 2\n\nA\n├── B"
    assert script("docstrings").to_markdown(text) == (
        "A sampler of \\[B, T\\].\n\n- `n`: \\[B\\] draws\n    of it\n- `seed, x`: a `[1]`\n\n- `row`: the row\n\n"
        "    q * 2\n\n```text\nA\n├── B\n```"
    )


# The site


class Loaded(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a copy of what it is made of."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("needs the extra 'docs'")
    copy = tmp_path_factory.mktemp("docs")
    for file in [*build.sources(), *DOCS.glob("*.py"), ROOT / "zensical.toml", *(ROOT / "src").rglob("*.py")]:
        (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy / file.relative_to(ROOT))
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "site"


@pytest.mark.slow
def test_the_site_needs_nothing_from_elsewhere_and_its_links_work(site: Path) -> None:
    pages = {page: Loaded(page) for page in site.rglob("*.html")}
    assert len(pages) >= 30
    for page, found in pages.items():
        if page.name == "404.html":  # its paths are those of a server's root
            continue
        assert [load for load in found.loads if re.match(r"(\w+:)?//", load)] == [], page
        local = [link for link in [*found.links, *found.loads] if not re.match(r"\w+:", link)]
        for path, _, anchor in (unquote(link).partition("#") for link in local):
            file = (page.parent / path).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), (page, path)
            if anchor and file in pages:
                assert anchor in pages[file].anchors, (page, path, anchor)


@pytest.mark.slow
def test_the_reference_shows_docstrings_and_settings(site: Path) -> None:
    text = (site / "docs" / "reference.html").read_text(encoding="utf-8")
    assert 'id="amortlm.Posterior.sample"' in text
    assert "Share of uniformly random tokens" in text  # the help of GFNConfig.epsilon
    assert f"One of {', '.join(amortlm.objectives.OBJECTIVES)}" in text, (
        "the help of GFNConfig.objective is computed"
    )
    assert all(f'id="amortlm.objectives.formulas.{name}"' in text for name in ("subtb", "alpha_divergence"))
    assert 'id="amortlm.objectives.records.Objective"' in text
    assert "metadata" not in text, "a setting shows its default, not the code that declares it"
    assert 'id="amortlm.GFNTrainer.train"' in text
    assert ":::" not in text


# The site as a reader sees it


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@needs_chromium
def test_pages_open_without_complaints_and_search_finds(address: str) -> None:
    pytest.importorskip("playwright")
    with browser() as found:
        backgrounds = set()
        for scheme in ("light", "dark"):
            for name in ("index", "docs/reference", "results/numbers/index"):
                for width in (1400, 390):
                    page, complaints = open_page(found, f"{address}/{name}.html", width, scheme)
                    page.wait_for_load_state("networkidle")
                    assert complaints == []
                    assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
                    backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2  # the scheme of the reader is followed
        for name in ("index", "docs/yaml", "docs/reference"):
            page, _ = open_page(found, f"{address}/{name}.html", 1280)
            cut = "[...document.querySelectorAll('pre > code')].filter(c => c.scrollWidth > c.clientWidth).length"
            assert page.evaluate(cut) == 0, f"{name}: code is cut off"
        page, complaints = open_page(found, f"{address}/docs/index.html", 1400)
        page.wait_for_load_state("networkidle")
        page.keyboard.press("Control+k")
        page.get_by_placeholder("Search").fill("certificate")
        page.get_by_text(re.compile(r"^\d+ results$")).wait_for()
        page.locator("a[href*='concepts.html'][href$='#certificate']").first.wait_for()
        assert complaints == []


@pytest.mark.slow
@needs_chromium
def test_notebooks_show_pictures_and_tell_code_from_what_it_prints(address: str) -> None:
    pytest.importorskip("playwright")
    grounds = """[...document.querySelectorAll('.highlight code')].map(code =>
        [code.querySelector('span[class]') !== null, getComputedStyle(code).backgroundColor])"""
    with browser() as found:
        for file in (ROOT / "notebooks").glob("*.ipynb"):
            for width, scheme in ((1400, "light"), (390, "dark")):
                page, complaints = open_page(found, f"{address}/notebooks/{file.stem}.html", width, scheme)
                page.wait_for_load_state("networkidle")
                assert complaints == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (file, width)
                blocks = page.evaluate(grounds)
                assert "rgba(0, 0, 0, 0)" in {ground for is_code, ground in blocks if not is_code}
                assert "rgba(0, 0, 0, 0)" not in {ground for is_code, ground in blocks if is_code}
                drawn = page.evaluate(
                    "[...document.images].map(image => [image.alt, image.naturalWidth > 0])"
                )
                assert drawn == [["What this code draws", True]] * file.read_text().count('"image/png"')
