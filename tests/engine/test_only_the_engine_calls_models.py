"""`engine/` is the only room that calls a language model: the others go through its passes, loops and samplers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import amortlm

SOURCE = Path(amortlm.__file__).parent
# Names that hold a network here, and what a caller would do with one.
NETWORKS = {"model", "network"}
METHODS = {
    "generate",
    "forward",
    "get_base_model",
    "get_output_embeddings",
    "get_input_embeddings",
    "base_model",
}


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that call a network, or reach for its parts: `x.model(..)`, `model(..)`, `x.model.generate(..)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in NETWORKS or (isinstance(called, ast.Attribute) and name in METHODS):
                yield node.lineno, ast.unparse(called)


def test_nobody_else_calls_one() -> None:
    allowed = {"train/trainer.py": 1}  # `model(rollouts)`: the policy, which DDP has wrapped
    found: dict[str, list[tuple[int, str]]] = {}
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        if not name.startswith("engine/") and (lines := list(calls(ast.parse(file.read_text("utf-8"))))):
            found[name] = lines
    assert {name: len(lines) for name, lines in found.items()} == allowed, found


@pytest.mark.parametrize(
    "line",
    [
        "lm.model(input_ids=ids)",
        "model(ids).logits",
        "policy.model.generate(ids)",
        "policy.model.get_output_embeddings()",
        "self.network(ids)",
    ],
)
def test_a_call_is_seen(line: str) -> None:
    assert list(calls(ast.parse(line)))
