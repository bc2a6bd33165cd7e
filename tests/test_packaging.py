"""What is built is what is installed: sdist, wheel, types, and a run without the repository.

The wheel is unpacked into an environment of its own, which borrows the other packages of this one: no network.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import amortlm

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "amortlm"

pytestmark = pytest.mark.slow

SCRIPT = """
from amortlm import LanguageModel, Policy, Posterior, Support

lm = LanguageModel.from_pretrained("embedded")
support = Support(stop=".", max_tokens=3)
posterior = Posterior(Policy(lm, "{x}", support), target=lm.log_prob("{z}", given="{x}"))
samples = posterior.sample({"x": "One day,"}, 2)
"""
TYPES = """
reveal_type(lm)
reveal_type(samples)
reveal_type(posterior.sample([{"x": "One day,"}], 2))
Support(stop=".", max_tokens="3")
"""
# The types of dependencies are not the question, and reading them takes minutes.
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*,transformers.*,peft.*,datasets.*,accelerate.*,arviz.*,numpy.*,matplotlib.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is made from the sdist."""
    if find_spec("build") is None or find_spec("hatchling") is None:
        pytest.skip("needs build and hatchling, of the extra 'dev'")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment with the wheel, and with the other packages of this one."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "lib" / version / "site-packages"
    zipfile.ZipFile(built[1]).extractall(packages)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


def run(*command: str, cwd: Path, ok: bool = True) -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # and no PYTHONPATH
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_package(built: tuple[Path, Path]) -> None:
    files = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    expected = {name for name in files if not name.endswith(".pyc")}
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if name.startswith("amortlm/")}
    assert found == expected
    needed = [
        "py.typed",
        "models/embedded/model.safetensors",
        "cli/commands/new.yaml",
        "report/templates/report.html",
    ]
    assert {f"amortlm/{name}" for name in needed} <= found


def test_the_sdist_has_what_tests_and_docs_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    needed = ["README.md", "LICENSE", "Makefile", "zensical.toml", "docs/build.py", "docs/index.md"]
    assert {*needed, "tests/conftest.py", "tests/public_api.txt", "results/numbers/README.md"} <= found
    assert not any(name.startswith(("site/", "build/", "runs/", ".")) for name in found - {".gitignore"})


def test_the_installed_package_runs(python: Path, tmp_path: Path) -> None:
    command = (
        "from importlib.metadata import entry_points as e; e(name='amortlm')['amortlm'].load()(['--version'])"
    )
    assert run(str(python), "-c", command, cwd=tmp_path) == f"amortlm {amortlm.__version__}\n"
    script = SCRIPT + "import amortlm\nprint(amortlm.__file__)\nprint(*(s.log_reward for s in samples))\n"
    home, scores = run(str(python), "-c", script, cwd=tmp_path).splitlines()
    assert Path(home).is_relative_to(python.parents[1])
    assert all(-100 < float(score) < 0 for score in scores.split())


def types(python: Path, folder: Path) -> str:
    (folder / "user.py").write_text(SCRIPT + TYPES)
    (folder / "mypy.ini").write_text(SETTINGS)
    checker = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    return run(*checker, cwd=folder, ok=False)


def test_a_users_script_sees_the_types(python: Path, tmp_path: Path) -> None:
    found = types(python, tmp_path).splitlines()
    told = [line.partition(": ")[2] for line in found[:-1]]
    assert told == [
        'note: Revealed type is "amortlm.language_model.LanguageModel"',
        'note: Revealed type is "amortlm.posterior.Samples"',
        'note: Revealed type is "list[amortlm.posterior.Samples]"',
        'error: Argument "max_tokens" to "Support" has incompatible type "str"; expected "int"  [arg-type]',
    ]


def test_without_py_typed_it_would_not(python: Path, tmp_path: Path) -> None:
    (marker,) = python.parents[1].glob("lib/*/site-packages/amortlm/py.typed")
    marker.rename(tmp_path / "py.typed")
    try:
        assert "py.typed" in types(python, tmp_path)
    finally:
        (tmp_path / "py.typed").rename(marker)
