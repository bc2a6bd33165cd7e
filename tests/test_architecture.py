"""The import graph of the library: no circles, and the laboratory is a leaf that only the command line knows of.

Imports within functions and under TYPE_CHECKING count: a circle is one whenever it closes.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

import amortlm

ROOT = Path(amortlm.__file__).parent
Graph = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    out = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of the library that a file imports, wherever in it; of a package's name, the module that has it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name and name.split(".")[0] == "amortlm"}


def files() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imported(path.read_text(encoding="utf-8"), set(known)) - {name} for name, path in known.items()
    }


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands on the ground floor."""
    return ".".join(module.split(".")[:2])


def by_room(graph: Graph) -> dict[str, set[str]]:
    out: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        if module != "amortlm":
            out[room(module)] |= {room(other) for other in others} - {room(module)}
    return dict(out)


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach one another."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for other in graph.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        reach[start] = seen
    found = {tuple(sorted({b for b in reach[a] if a in reach.get(b, ())})) for a in graph}
    return sorted(list(c) for c in found if c)


def test_no_circle_by_file() -> None:
    assert circles(files()) == []


def test_no_circle_by_folder() -> None:
    assert circles(by_room(files())) == []


def test_only_the_command_line_knows_the_laboratory() -> None:
    who = {a for a, others in files().items() for b in others if room(b) == "amortlm.lab"}
    assert {room(a) for a in who} == {"amortlm.lab", "amortlm.cli"}


def test_only_the_command_line_knows_the_service() -> None:
    who = {room(a) for a, others in files().items() for b in others if room(b) == "amortlm.serve"}
    assert who == {"amortlm.serve", "amortlm.cli"}


@pytest.mark.parametrize("name", [n for n in modules() if room(n) == "amortlm.cli"])
def test_the_command_line_imports_it_lazily(name: str) -> None:
    body = ast.parse(modules()[name].read_text(encoding="utf-8")).body
    top = ast.Module([n for n in body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    found = imported(ast.unparse(top), set(modules()))
    assert not {b for b in found if room(b) in ("amortlm.lab", "amortlm.serve")}


def test_a_circle_is_found() -> None:
    """Controls: through a function, a TYPE_CHECKING block, and a package."""
    source = "if TYPE_CHECKING:\n    from amortlm.b import B\ndef f():\n    from amortlm import c\n    import amortlm.d\n"
    assert imported(source, {"amortlm.b", "amortlm.c"}) == {"amortlm.b", "amortlm.c", "amortlm.d"}
    graph = {"amortlm.a.x": {"amortlm.b"}, "amortlm.b": {"amortlm.a.y"}, "amortlm.a.y": set()}
    assert circles(graph) == []
    assert circles(by_room(graph)) == [["amortlm.a", "amortlm.b"]]


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def depth(node: ast.AST) -> int:
    """How deep blocks are nested in a node; `elif` is no deeper than its `if`, inner functions count for themselves."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def too_much(source: str) -> list[str]:
    """The functions of more than 50 lines, or nested deeper than 4."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    return [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 50 or depth(f) > 4]


def test_functions_are_short_and_flat() -> None:
    found = {file: names for file in ROOT.rglob("*.py") if (names := too_much(file.read_text("utf-8")))}
    assert found == {}


def test_a_long_and_a_deep_function_are_found() -> None:
    long = "def long():\n" + "    pass\n" * 50
    deep = "def deep():\n" + "".join("    " * (i + 1) + "if x:\n" for i in range(5)) + "    " * 6 + "pass\n"
    flat = deep.replace(
        "                    if x:\n                        pass\n", "                    pass\n"
    )
    assert too_much(long) == ["long"]
    assert too_much(deep) == ["deep"]
    assert too_much(flat) == too_much(long.replace("    pass\n", "", 1)) == []
