"""The flat public API: every name imports, importing the package costs nothing, and changes show up here."""

from __future__ import annotations

import difflib
import subprocess
import sys
from dataclasses import fields

import public_api
import pytest
from transformers import TrainingArguments

import amortlm
from amortlm import GFNConfig, errors

# Taking a name out or renaming it breaks the programs of users: say so in CHANGELOG.md.
NAMES = """
AmortLMError Calculator Diagnosis EM Exploration GFNConfig GFNTrainer LanguageModel LogProb Lookup MStep
Policy PolicyLogProbs Posterior Prediction ReplayBuffer Rollouts Sample Samples Support Target Tool Unordered Verifier Votes
__version__ bounds constraint default_lora errors exact guided importance narrow objectives tempered verifier
"""
SETTINGS = """
behaviour buffer_prioritized buffer_size corrected_method corrected_particles diagnose_steps epsilon hard_penalty
max_staleness narrow_support num_samples objective reward_temperature rollout stop_at_gap temperature_range
"""
CONSTRAINTS = (
    "allowed_tokens",
    "canonical",
    "contains",
    "distinct",
    "grammar",
    "json_schema",
    "length",
    "matches",
    "predicate",
    "relation",
)


def own_settings() -> list[str]:
    inherited = {f.name for f in fields(TrainingArguments)}
    return sorted(f.name for f in fields(GFNConfig) if f.name not in inherited)


def test_the_public_names_are_these() -> None:
    assert sorted(amortlm.__all__) == NAMES.split()


@pytest.mark.parametrize("name", amortlm.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(amortlm, name) is not None
    assert name in dir(amortlm)


def test_names_are_what_their_modules_define() -> None:
    from amortlm.targets import constraints
    from amortlm.train import GFNTrainer

    assert amortlm.GFNTrainer is GFNTrainer
    assert amortlm.constraint is constraints
    assert all(callable(getattr(amortlm.constraint, name)) for name in CONSTRAINTS)


def test_methods_and_signatures_are_these() -> None:
    before, now = public_api.FILE.read_text(encoding="utf-8"), public_api.describe()
    changed = difflib.unified_diff(
        before.splitlines(), now.splitlines(), "public_api.txt", "now", n=0, lineterm=""
    )
    renew = "meant? run `python tests/helpers/public_api.py`, and say in CHANGELOG.md what breaks programs of users"
    assert before == now, "\n".join([*changed, renew])


def test_a_snapshot_sees_what_a_caller_sees() -> None:
    class Shape:
        def area(self, scale: float = 1.0, *, unit: str = "m") -> float:
            return scale

        def _own(self) -> None: ...

        @property
        def sides(self) -> int:
            return 4

    Shape.__module__ = "amortlm.shapes"
    assert list(public_api.lines("Shape", Shape)) == [
        "class Shape",
        "  Shape.area(scale: float = 1.0, *, unit: str = 'm') -> float",
        "  Shape.sides: int",
    ]
    assert list(public_api.lines("f", lambda x, y=2: x)) == ["f(x, y=2)"]


def test_a_star_import_gives_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from amortlm import *", space)
    assert set(amortlm.__all__) <= set(space)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GFNTrainerr'"):
        _ = amortlm.GFNTrainerr
    assert not hasattr(amortlm, "anything_else")


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, amortlm; print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_settings_are_these() -> None:
    assert own_settings() == SETTINGS.split()
    assert len(own_settings()) <= 16


@pytest.mark.parametrize("name", SETTINGS.split())
def test_every_setting_is_explained(name: str) -> None:
    (setting,) = (f for f in fields(GFNConfig) if f.name == name)
    assert len(setting.metadata.get("help", "")) > 15
    assert "Paper:" in setting.metadata["help"] or name == "diagnose_steps"


def test_every_error_is_caught_by_the_base_class() -> None:
    kinds = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)}
    assert {k.__name__ for k in kinds} == {
        "AmortLMError", "CheckpointError", "ConfigError", "DataError", "HubError", "MissingExtraError", "ModelError", "PromptTooLongError",
        "RewardError", "RolloutError", "SupportError", "TemplateError", "TrainingError",
    }  # fmt: skip
    assert all(issubclass(k, amortlm.AmortLMError) for k in kinds)
    assert all(k.__name__ in (errors.__doc__ or "") for k in kinds)
