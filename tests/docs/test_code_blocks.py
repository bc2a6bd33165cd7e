"""Every code block of README.md and docs/ does what it says when it is pasted.

Python runs, a page's blocks one after the other in one namespace; YAML becomes a run; `amortlm` commands parse. Only the
length of training is cut: the calls are those of the page. A block that cannot run everywhere has the comment
`<!-- not run: why -->` on the line before it, which a reader of the source sees, too.
"""

from __future__ import annotations

import functools
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from amortlm import GFNConfig, LanguageModel
from amortlm.cli.options import make_parser
from amortlm.em import MStep
from amortlm.targets.functions import Trust
from amortlm.targets.spec import target_from_spec
from amortlm.train.spec import RunSpec

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<before>[^\n]*)\n```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
EXTRAS = {"genlm.control": "genlm", "outlines_core": "patterns"}
STEPS = 2

RUN: dict[str, Any] = {  # what a block of YAML that states a part of a run is a part of
    "prompt": "{x}",
    "target": [{"log_prob": {"of": "{z}", "given": "{x}"}}],
    "support": {"stop": ".", "max_tokens": 5},
    "data": [{"x": "One day", "y": "The end."}],
}
RULES = """
def is_polite(text):
    return "please" in text


def rhymes(statements):
    return statements[0][-1:] == statements[-1][-1:]


def score(texts, rows):
    return [-float(len(text)) for text in texts]
"""


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], text[: found.start("text")].count("\n") + 1)
        for found in FENCE.finditer(text)
        if found["language"] in languages and not NOT_RUN.fullmatch(found["before"])
    ]


def pages(*languages: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, *languages)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of its own, and trainings of few updates: what is learned is measured elsewhere."""
    check = GFNConfig.__post_init__

    def shortened(self: GFNConfig) -> None:
        self.max_steps, self.num_samples = min(self.max_steps, STEPS), min(self.num_samples, 8)
        check(self)

    monkeypatch.setattr(GFNConfig, "__post_init__", shortened)
    monkeypatch.setattr("amortlm.em.MStep", functools.partial(MStep, steps=STEPS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("python"))
def test_python_runs(page: Path, short: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for module, extra in EXTRAS.items():
            if module in block.text and not installed(module):
                pytest.skip(f"needs the extra {extra!r}")
        code = "\n" * (block.line - 1) + block.text  # so that a traceback has the line of the page
        exec(compile(code, str(page), "exec"), names)


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", pages("yaml"))
def test_yaml_is_a_run(
    page: Path, short: Path, embedded: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "my_package").mkdir()
    (short / "my_package" / "rules.py").write_text(RULES, encoding="utf-8")
    monkeypatch.syspath_prepend(short)
    for block in blocks(page, "yaml"):
        stated = yaml.safe_load(block.text)
        file = short / "run.yaml"
        whole = set(RUN) <= set(stated)
        rest = yaml.safe_dump({key: value for key, value in RUN.items() if key not in stated})
        file.write_text(block.text if whole else block.text + rest, encoding="utf-8")
        spec = RunSpec.from_yaml(file)
        target_from_spec(spec.target, embedded, Trust(["my_package"]))
        if whole:
            spec.trainer(str(short / "out")).train()
            assert (short / "out" / "posterior.json").exists()


@pytest.mark.parametrize("page", pages("bash"))
def test_commands_parse(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["amortlm"]:
                try:
                    make_parser().parse_args(command[1:])
                except SystemExit:
                    pytest.fail(f"{page.name}: amortlm does not take: {line}")
