"""Folders and files that try to run code, to take all memory, or never to end: refused in a sentence, and nothing runs.

Each of them would leave a mark (an empty file) where anything of it ran.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Posterior, Support
from amortlm.cli import main
from amortlm.diagnostics.certificate import Certificate
from amortlm.errors import AmortLMError, CheckpointError, ConfigError
from amortlm.train.spec import RunSpec

ROW = {"x": "the dog"}
SUPPORT = Support(stop=".", max_tokens=2)


class Touch:
    """A pickle that leaves the mark when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


@pytest.fixture
def modules(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can be imported from, with a module that leaves the mark, and one that has imported another."""
    folder = tmp_path / "modules"
    folder.mkdir()
    touch = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / "hostile.py").write_text(touch + "def judge(text):\n    return True\n")
    (folder / "harmless.py").write_text(
        "import os\nfrom os import system\nfrom json import loads as judge\n"
        "def is_short(text):\n    return len(text) < 4\n"
        "def scores(texts, rows):\n    return [0.0 for _ in texts]\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("hostile", "harmless"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(one_lm: LanguageModel, tmp_path: Path) -> Path:
    """A saved posterior to tamper with, its model in a folder beside it."""
    model, saved = tmp_path / "model", tmp_path / "saved"
    one_lm.model.save_pretrained(model)
    one_lm.tokenizer.save_pretrained(model)
    Posterior(Policy(one_lm, "{x}", SUPPORT), one_lm.log_prob("{z}", given="{x}")).save_pretrained(saved)
    edit(saved / "posterior.json", model=str(model))
    return saved


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, mark: Path, message: str, **options: Any) -> str:
    """Loading and sampling end in one sentence of ours, and nothing has run."""
    with pytest.raises(AmortLMError) as e:
        Posterior.from_pretrained(folder, **options).sample(ROW, 2)
    assert not mark.exists(), "it ran"
    assert message in str(e.value), str(e.value)
    return str(e.value)


# Functions that a saved target names


TARGETS: dict[str, tuple[list[Any], str]] = {
    "a predicate": ([{"predicate": "hostile:judge"}], "--trust hostile"),
    "a predicate with settings": ([{"predicate": {"function": "hostile:judge", "timeout": 3}}], "--trust hostile"),
    "a verifier": ([{"verifier": {"function": "hostile:judge"}}], "trust=['hostile']"),
    "inside a set": ([{"unordered": {"target": [{"predicate": "hostile:judge"}], "separator": ","}}], "--trust hostile"),
    "the shell": ([{"predicate": "os:system"}], "standard library"),
    "the shell as a verifier": ([{"verifier": {"function": "subprocess:run"}}], "standard library"),
    "eval": ([{"predicate": "builtins:eval"}], "standard library"),
    "an attribute of an attribute": ([{"predicate": "harmless:os.system"}], "write 'package.module:function'"),
    "a path": ([{"predicate": "../hostile:judge"}], "write 'package.module:function'"),
    "a relative import": ([{"predicate": ".hostile:judge"}], "write 'package.module:function'"),
    "an import path of ours": ([{"predicate": "amortlm.train.spec:load_rows"}], "--trust amortlm.train.spec"),
    "no text": ([{"predicate": ["hostile:judge"]}], "target term 'predicate': function must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_functions_of_a_saved_target_are_not_imported(
    folder: Path, mark: Path, modules: Path, name: str
) -> None:
    target, message = TARGETS[name]
    edit(folder / "posterior.json", target=target)
    said = refused(folder, mark, message)
    assert str(folder) in said
    assert "hostile" not in sys.modules


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("harmless:system", "defined in another module"),
        ("harmless:judge", "defined in another module"),
        ("harmless:os", "no function 'os'"),
        ("harmless:__import__", "no function '__import__'"),
        ("harmless:__loader__", "function"),
        ("harmless.os:system", "cannot import"),
        ("harmlessly:judge", "--trust harmlessly"),
    ],
)
def test_trust_in_a_module_ends_with_it(
    folder: Path, mark: Path, modules: Path, function: str, message: str
) -> None:
    edit(folder / "posterior.json", target=[{"predicate": function}])
    refused(folder, mark, message, trust=["harmless"])


def test_the_standard_library_cannot_be_trusted(folder: Path, mark: Path) -> None:
    edit(folder / "posterior.json", target=[{"predicate": "os:system"}])
    refused(folder, mark, "standard library", trust=["os"])


@pytest.mark.parametrize("trust", [["harmless"], ["{modules}/harmless.py"]])
def test_what_is_trusted_is_used(folder: Path, modules: Path, trust: list[str]) -> None:
    target = [{"predicate": "harmless:is_short"}, {"verifier": {"function": "harmless:scores"}}]
    edit(folder / "posterior.json", target=target)
    allowed = [name.format(modules=modules) for name in trust]
    if allowed != trust:
        sys.path.remove(str(modules))  # a file is found where it is
    posterior = Posterior.from_pretrained(folder, trust=allowed)
    assert {s.log_reward for s in posterior.sample(ROW, 20)} == {0.0, -float("inf")}
    posterior.save_pretrained(folder.parent / "again")
    again = json.loads((folder.parent / "again" / "posterior.json").read_text())["target"]
    assert again[0]["predicate"] == "harmless:is_short", "by the name it had"


def test_a_package_is_trusted_with_what_is_below_it(folder: Path, modules: Path) -> None:
    (modules / "pack").mkdir()
    (modules / "pack" / "__init__.py").write_text("from pack.rules import judge\n")
    (modules / "pack" / "rules.py").write_text("def judge(text):\n    return True\n")
    for function in ("pack.rules:judge", "pack:judge"):
        edit(folder / "posterior.json", target=[{"predicate": function}])
        assert Posterior.from_pretrained(folder, trust=["pack"]).sample(ROW, 1)[0].log_reward == 0.0
    (modules / "rooted.py").write_text("from pack.rules import judge\n")
    edit(folder / "posterior.json", target=[{"predicate": "rooted:judge"}])
    with pytest.raises(ConfigError, match="defined in another module, 'pack.rules'"):
        Posterior.from_pretrained(folder, trust=["rooted"])


def test_a_target_given_takes_the_place_of_the_saved_one(
    folder: Path, mark: Path, one_lm: LanguageModel
) -> None:
    edit(folder / "posterior.json", target=[{"predicate": "hostile:judge"}])
    Posterior.from_pretrained(folder, target=one_lm.log_prob("{z}")).sample(ROW, 1)
    assert not mark.exists()


def test_functions_that_ship_need_no_trust(folder: Path) -> None:
    # By its name, and as it was saved before it had one.
    for name in ("numbers.is_valid", "amortlm.lab.tasks.numbers:is_valid", "amortlm.tasks.numbers:is_valid"):
        edit(folder / "posterior.json", target=[{"predicate": name}])
        posterior = Posterior.from_pretrained(folder)
        assert posterior.target is not None
        assert posterior.target.to_spec()[0]["predicate"] == "numbers.is_valid"


@pytest.mark.parametrize("trust", ["harmless", 3, [3], ["nowhere.py"]])
def test_trust_is_a_list_of_modules_or_files(folder: Path, trust: Any) -> None:
    with pytest.raises(ConfigError, match="trust"):
        Posterior.from_pretrained(folder, trust=trust)


def test_the_command_line_trusts_by_name(
    folder: Path, mark: Path, modules: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "posterior.json", target=[{"predicate": "harmless:is_short"}])
    ask = ["sample", str(folder), "--column", "x=the dog"]
    assert main(ask) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "--trust harmless" in err
    assert main([*ask, "--trust", "harmless"]) == 0
    assert main([*ask, "--trust", str(modules / "harmless.py")]) == 0


# Weights, models and tokenizers


def pickled(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps({"weight": Touch(mark)}))


def pickled_model(folder: Path, mark: Path) -> None:
    model = folder.parent / "model"
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", mark)


def pickled_adapter(folder: Path, mark: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder / "adapter_model.bin", mark)


def pickle_called_safetensors(folder: Path, mark: Path) -> None:
    pickled(folder / "adapter_model.safetensors", mark)


def pickled_full_model(folder: Path, mark: Path) -> None:
    for file in folder.glob("adapter*"):
        file.unlink()
    edit(folder / "posterior.json", weights="full")
    shutil.copy(folder.parent / "model" / "config.json", folder)
    pickled(folder / "pytorch_model.bin", mark)


def model_with_code(folder: Path, mark: Path) -> None:
    model = folder.parent / "model"
    (model / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass M: pass\nclass C: pass\n"
    )
    edit(
        model / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    )


def tokenizer_with_code(folder: Path, mark: Path) -> None:
    model = folder.parent / "model"
    (model / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass T: pass\n")
    edit(
        model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["code.T", "code.T"]}
    )
    (model / "tokenizer.json").unlink()


def adapter_of_megatron(folder: Path, mark: Path) -> None:
    edit(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="hostile")


def adapter(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda folder, mark: edit(folder / "adapter_config.json", **changes)


def support(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda folder, mark: edit(folder / "posterior.json", support={"stop": ".", **changes})


def posterior(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda folder, mark: edit(folder / "posterior.json", **changes)


def linked(folder: Path, mark: Path) -> None:
    (folder / "posterior.json").unlink()
    (folder / "posterior.json").symlink_to("/dev/zero")


FOLDERS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickled model": (pickled_model, "cannot load a causal LM"),
    "a pickled adapter": (pickled_adapter, "cannot read adapter_model.safetensors"),
    "a pickle called safetensors": (pickle_called_safetensors, "cannot read adapter_model.safetensors"),
    "a pickled full model": (pickled_full_model, "cannot read model.safetensors"),
    "a model with code": (model_with_code, "it contains code, which is not run"),
    "a tokenizer with code": (tokenizer_with_code, "cannot load a causal LM"),
    "an adapter of megatron": (adapter_of_megatron, "megatron_config"),
    "an adapter of another kind": (adapter(peft_type="EVIL"), "cannot read adapter_config.json"),
    "an adapter of no layer": (adapter(target_modules=["../x"]), "belongs to another model"),
    "an adapter of prompts": (adapter(peft_type="PREFIX_TUNING", num_virtual_tokens=10**9), "adapter_config.json"),
    "a rank that takes all memory": (adapter(r=10**9), "rank 1000000000"),
    "a rank of text": (adapter(r="big"), "cannot read adapter_config.json"),
    "layers by an expression without end": (adapter(target_modules=r"((\w|\.)*)*!"), "adapter"),
    "max_tokens without end": (support(max_tokens=10**9), "more than any model can read"),
    "max_tokens beyond the context": (support(max_tokens=10**5), "has a context of"),
    "statements without end": (support(max_tokens=10**9, separator=","), "more than any model can read"),
    "a tool that does not ship": (support(tool={"hostile": {}}), "unknown tool 'hostile'"),
    "attributes in a template": (posterior(prompt="{x.__class__.__init__.__globals__}"), "not a plain column name"),
    "an index in a target": (posterior(target=[{"log_prob": {"of": "{z}{x[0]}"}}]), "not a plain column name"),
    "a model out of the tree": (posterior(model="../../../../../../etc"), "--model"),
    "a posterior.json without end": (linked, "missing or damaged"),
    "a posterior.json nested without end": (
        lambda folder, mark: (folder / "posterior.json").write_text("[" * 10**6) and None,
        "missing or damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folders_are_refused(folder: Path, mark: Path, modules: Path, name: str) -> None:
    tamper, message = FOLDERS[name]
    tamper(folder, mark)
    refused(folder, mark, message)


def test_what_an_adapter_says_of_other_modules_is_left_unread(
    folder: Path, mark: Path, modules: Path, one_lm: LanguageModel
) -> None:
    before = Posterior.from_pretrained(folder).log_prob(ROW, [" a"])
    edit(
        folder / "adapter_config.json",
        auto_mapping={"parent_library": "hostile", "base_model_class": "judge"},
        base_model_name_or_path=str(modules),
        revision="hostile",
    )
    assert Posterior.from_pretrained(folder).log_prob(ROW, [" a"]) == before
    assert not mark.exists()


def test_chat_templates_are_sandboxed(folder: Path, mark: Path) -> None:
    (folder.parent / "model" / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    )
    edit(folder / "posterior.json", prompt=[{"role": "user", "content": "{x}"}], target=None)
    with pytest.raises(Exception, match="unsafe"):
        Posterior.from_pretrained(folder).sample(ROW, 1)
    assert not mark.exists()


# Wrong kinds of values, everywhere

WRONG = [None, True, -1, 0, 10**9, 1.5, "", "x", [], ["x"], [None], [[]], {}, {"a": 1}, "\x00", float("nan")]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in items for p in places(v, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def test_no_value_of_another_kind_is_a_traceback(folder: Path, one_lm: LanguageModel) -> None:
    spec = json.loads((folder / "posterior.json").read_text())
    spec["support"]["tool"] = {"lookup": {"table": {"a": "b"}, "trigger": ":"}}
    spec["target"] += [
        {"contains": ["dog"], "penalty": 3, "weight": 2, "temperature": 1},
        {"matches": "[a-z ]*"},
        {"length": {"minimum": 0, "maximum": 3}},
        {"allowed_tokens": [" a"], "penalty": 1},
        {"canonical": True, "penalty": 1},
    ]
    rng, loaded, raw = random.Random(0), 0, []
    for path in places(spec):
        for new in rng.sample(WRONG, 5):
            (folder / "posterior.json").write_text(json.dumps(replaced(spec, path, new)))
            try:
                Posterior.from_pretrained(folder, lm=one_lm).sample(ROW, 1)
                loaded += 1
            except AmortLMError:
                pass
            except Exception as e:
                raw.append(f"{path} = {new!r}: {type(e).__name__}: {e}")
    assert not raw, "\n".join(raw)
    assert loaded > 10


@pytest.fixture
def certificate(folder: Path) -> dict[str, Any]:
    report = {"gap": 0.1, "kl_qp": 0.1, "exact_log_z": 0.0}
    return {
        "mark": 0.1, "reached": 0.05, "level": 0.99, "step": 5, "n": 256, "seed": 0, "rows": [ROW], "gold": [[[3]]],
        "reports": [report], "prompt": "{x}", "support": {}, "target": [{"predicate": "hostile:judge"}],
        "data_hash": "", "adapter_hash": "", "versions": {}, "quantity": "", "format": 1,
    }  # fmt: skip


def test_a_certificate_is_data(folder: Path, mark: Path, modules: Path, certificate: dict[str, Any]) -> None:
    (folder / "certificate.json").write_text(json.dumps(certificate))
    assert Certificate.load(folder).target == [{"predicate": "hostile:judge"}]
    assert main(["evaluate", str(folder), "--check", "--column", "x=a"]) == 1
    assert not mark.exists()
    for name in ("mark", "level", "n", "rows", "gold", "reports", "target", "format"):
        for new in ("x", -1, [3], {"a": 1}, 10**9):
            (folder / "certificate.json").write_text(json.dumps({**certificate, name: new}))
            if name != "mark" or new != 10**9:
                with pytest.raises(CheckpointError, match="missing or damaged"):
                    Certificate.load(folder)


# Run files

RUN: dict[str, Any] = {
    "prompt": "{x}", "support": {"stop": ".", "max_tokens": 2}, "data": [ROW], "adapter": 2,
    "config": {"max_steps": 1, "num_samples": 2, "diagnose_steps": 0, "objective": "vargrad", "use_cpu": True},
}  # fmt: skip


def write_run(folder: Path, **changes: Any) -> Path:
    file = folder.parent / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "model": str(folder.parent / "model"), **changes}))
    return file


def test_yaml_builds_no_objects(folder: Path, mark: Path) -> None:
    file = folder.parent / "run.yaml"
    file.write_text(f"prompt: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        RunSpec.from_yaml(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("os:system", "standard library"),
        ("hostile:judge", "--trust hostile"),
        ("json:judge", "standard library"),
    ],
)
def test_a_run_file_names_no_module_elsewhere(
    folder: Path, mark: Path, modules: Path, function: str, message: str
) -> None:
    (folder.parent / "json.py").write_text("def judge(text):\n    return True\n")  # shadows nothing
    spec = RunSpec.from_yaml(write_run(folder, target=[{"predicate": function}]))
    with pytest.raises(ConfigError, match=message):
        spec.trainer(str(folder.parent / "out"))
    assert not mark.exists()


def test_a_run_file_cannot_trust_for_its_user(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'trust'"):
        RunSpec.from_yaml(write_run(folder, target=[{"predicate": "hostile:judge"}], trust=["hostile"]))


def test_a_module_beside_the_run_file_is_used_and_the_command_says_how_to_load_it(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "rules.py").write_text("def short(text):\n    return len(text) < 9\n")
    file, path = (
        write_run(folder, target=[{"log_prob": {"of": "{z}"}}, {"predicate": "rules:short"}]),
        list(sys.path),
    )
    assert main(["train", str(file), "--output", str(folder.parent / "out")]) == 0
    assert sys.path == path
    assert "rules" not in sys.modules, "not in the way of another module of that name"
    advice = capfd.readouterr().out.splitlines()[-1].split("amortlm ")[1].split()
    assert main(advice[:2]) == 2
    assert "--trust rules" in capfd.readouterr().err
    assert main(advice) == 0, "the command that was printed"


def test_a_checkpoint_of_pickles_is_not_resumed(one_lm: LanguageModel, tmp_path: Path, mark: Path) -> None:
    def trainer(steps: int) -> GFNTrainer:
        args = GFNConfig(
            output_dir=str(tmp_path / "run"), max_steps=steps, num_samples=2, save_steps=1, objective="vargrad",
            diagnose_steps=0, use_cpu=True,
        )  # fmt: skip
        target = one_lm.log_prob("{z}", given="{x}")
        return GFNTrainer(
            one_lm, target=target, prompt="{x}", support=SUPPORT, train_dataset=[ROW], args=args
        )

    trainer(1).train()
    for name in ("optimizer.pt", "rng_state.pth"):
        run = tmp_path / "run" / "checkpoint-1"
        kept = (run / name).read_bytes()
        pickled(run / name, mark)
        with pytest.raises((AmortLMError, pickle.UnpicklingError)):
            trainer(2).train(resume_from_checkpoint=str(run))
        assert not mark.exists()
        (run / name).write_bytes(kept)
