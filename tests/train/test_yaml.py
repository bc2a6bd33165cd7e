"""Targets and whole runs as YAML, and the data files that they name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reference import random_rollouts
from transformers import TrainingArguments

from amortlm import GFNConfig, LanguageModel, Target, Unordered, constraint, verifier
from amortlm.errors import AmortLMError, ConfigError, DataError, SupportError, TemplateError
from amortlm.lab.tasks import TASKS, load_task
from amortlm.settings import load_yaml
from amortlm.support import Support
from amortlm.targets.functions import Trust
from amortlm.targets.spec import ARGUMENTS, _builders, target_from_spec
from amortlm.train.spec import RunSpec

ROWS = [{"x": "the dog", "y": " ran"}, {"x": "a", "y": " a cat"}]
# Few tokens, so that every kind of term below accepts some completions and rejects others.
TOKENS = (" ", "a", " a", " cat", "t")
SUPPORT = Support(stop=(".", "!"), min_tokens=0, max_tokens=3, allowed_tokens=TOKENS)


def short(text: str) -> bool:
    return len(text) < 5


def longer_than_x(text: str, row: dict) -> bool:
    return len(text) > len(row["x"])


def minus_length(texts: list[str], rows: list[dict]) -> list[float]:
    return [-float(len(t)) for t in texts]


def begins_alike(statements: list[str], row: dict) -> bool:
    return len({s[:1] for s in [*statements, row["x"]]}) < 3


HERE = Trust([__name__])

# Targets

KINDS: dict[str, Callable[[LanguageModel], Target]] = {
    "log_prob": lambda lm: lm.log_prob("{z}{y}", given="{x}"),
    "log_prob with z given": lambda lm: lm.log_prob("{y}", given="{x}{z}"),
    "tempered": lambda lm: lm.log_prob("{z}") / 0.8,
    "contrastive": lambda lm: 1.5 * lm.log_prob("{z}", given="{x}") - 0.5 * lm.log_prob("{z}"),
    "contains": lambda lm: constraint.contains("a", "cat"),
    "contains, soft": lambda lm: constraint.contains("cat", penalty=4.0),
    "matches": lambda lm: constraint.matches("[a-m ]*"),
    "allowed_tokens": lambda lm: constraint.allowed_tokens("a", " cat", *range(2, 20)),
    "canonical": lambda lm: constraint.canonical(penalty=1.5),
    "length": lambda lm: constraint.length(1, 2),
    "length, open": lambda lm: constraint.length(2, penalty=2.0),
    "predicate": lambda lm: constraint.predicate(short),
    "predicate of a row": lambda lm: constraint.predicate(f"{__name__}:longer_than_x"),
    "verifier": lambda lm: verifier(minus_length),
    "verifier of prefixes": lambda lm: -2.0 * verifier(minus_length, every_prefix=True),
    "statements": lambda lm: lm.log_prob("{y}", given="{x}{z1} so"),
    "distinct": lambda lm: constraint.distinct(penalty=0.5),
    "relation": lambda lm: constraint.relation(begins_alike),
    "unordered": lambda lm: Unordered(lm.log_prob("{z}", given="{x}") / 2, ","),
    "sum": lambda lm: (lm.log_prob("{z}") + 2 * verifier(minus_length)) / 0.5 + constraint.length(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_survives_yaml(one_lm: LanguageModel, kind: str) -> None:
    target = KINDS[kind](one_lm).bind(one_lm)
    text = yaml.safe_dump(target.to_spec())
    rebuilt = target_from_spec(yaml.safe_load(text), one_lm, HERE)
    lists = Support(stop=(".", "!"), max_tokens=3, allowed_tokens=TOKENS[:3], separator="t").bind(one_lm)
    if target.statements:
        every = [z for n in range(1, 4) for z in lists.completions(n)]
        tokens = torch.tensor([z + [0] * (3 - len(z)) for z in every])
        lengths = torch.tensor([len(z) for z in every])
        rollouts = lists.rollouts(ROWS, torch.arange(len(every)) % 2, tokens, lengths)
    else:
        rollouts = random_rollouts(one_lm, SUPPORT, ROWS, per_row=20)
    scores = target.score(rollouts)
    torch.testing.assert_close(rebuilt.score(rollouts), scores)
    assert scores[rollouts.stop_mask].unique().numel() > 1, "the term tells these completions apart"
    assert rebuilt.columns == target.columns
    assert rebuilt.every_prefix == target.every_prefix
    assert rebuilt.to_spec() == (1.0 * target).to_spec()


def test_every_kind_of_term_is_covered(one_lm: LanguageModel) -> None:
    written = {name for make in KINDS.values() for term in make(one_lm).to_spec() for name in term}
    as_matches = {"json_schema", "grammar"}
    assert set(_builders(one_lm)) == (written - {"weight", "penalty"}) | as_matches


def test_a_json_schema_is_its_expression(one_lm: LanguageModel) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    found = target_from_spec([{"json_schema": schema}], one_lm, HERE)
    assert found.to_spec() == (1.0 * constraint.json_schema(schema)).to_spec()
    with pytest.raises(ConfigError, match="target term 'json_schema'"):
        target_from_spec([{"json_schema": "integer"}], one_lm, HERE)


def test_a_grammar_is_its_expression(one_lm: LanguageModel) -> None:
    nested = {"source": 'root ::= "a" root? "t"', "depth": 2}
    for given, arguments in (('root ::= "a" | "t"', ['root ::= "a" | "t"']), (nested, list(nested.values()))):
        found = target_from_spec([{"grammar": given}], one_lm, HERE)
        assert found.to_spec() == (1.0 * constraint.grammar(*arguments)).to_spec()
    with pytest.raises(ConfigError, match="depth"):
        target_from_spec([{"grammar": {"source": "root ::= root", "depth": "deep"}}], one_lm, HERE)


def scored(lm: LanguageModel, text: str) -> torch.Tensor:
    return target_from_spec(yaml.safe_load(text), lm, HERE).score(
        random_rollouts(lm, SUPPORT, ROWS, per_row=20)
    )


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("- log_prob: {of: '{z}{y}', given: '{x}'}\n  temperature: 0.8", lambda lm: lm.log_prob("{z}{y}", "{x}") / 0.8),
        ("- {log_prob: {of: '{z}'}, weight: -5e-1}", lambda lm: -0.5 * lm.log_prob("{z}")),
        ("- {log_prob: {of: '{z}'}, weight: 3, temperature: 2}", lambda lm: 1.5 * lm.log_prob("{z}")),
        ("- contains: [cat, a]\n  penalty: 1e1", lambda lm: constraint.contains("cat", "a", penalty=10.0).bind(lm)),
        ("- contains: cat", lambda lm: constraint.contains("cat").bind(lm)),
        ("- allowed_tokens: ' a'", lambda lm: constraint.allowed_tokens(" a").bind(lm)),
        ("- allowed_tokens: 7", lambda lm: constraint.allowed_tokens(7).bind(lm)),
        ("- length: {maximum: 2}", lambda lm: constraint.length(0, 2)),
        ("- verifier: {function: 'test_yaml:minus_length'}", lambda lm: verifier(minus_length).bind(lm)),
        ("- canonical: true\n- length: {minimum: 1}", lambda lm: (constraint.canonical() + constraint.length(1)).bind(lm)),
    ],
)  # fmt: skip
def test_yaml_means_what_it_says(
    one_lm: LanguageModel, text: str, make: Callable[[LanguageModel], Target]
) -> None:
    rollouts = random_rollouts(one_lm, SUPPORT, ROWS, per_row=20)
    torch.testing.assert_close(scored(one_lm, text), make(one_lm).score(rollouts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- lob_prob: {of: '{z}'}", "unknown target term 'lob_prob'; did you mean 'log_prob'?"),
        ("- {length: {minimum: 1}, wieght: 2}", "unknown target term 'wieght'; did you mean 'weight'?"),
        ("- {weight: 2}", "names exactly one of"),
        ("- {contains: [a], matches: a}", "names exactly one of"),
        ("- canonical", "a target term is a mapping such as {contains: [dog]}, got 'canonical'"),
        ("- canonical: false", "write `canonical: true`, or leave the term out"),
        ("- log_prob: {ov: '{z}'}", "target term 'log_prob' with {'ov': '{z}'}"),
        ("- log_prob: '{z}'", "target term 'log_prob' with '{z}'"),
        ("- {log_prob: {of: '{z}'}, penalty: 3}", "target term 'log_prob' with"),
        ("- {verifier: {function: 'test_yaml:minus_length'}, penalty: 3}", "target term 'verifier' with"),
        ("- verifier: {every_prefix: true}", "target term 'verifier' with"),
        ("- verifier: {function: 'test_yaml:minus_length', every_perfix: true}", "'every_perfix'"),
        ("- verifier: test_yaml:minus_length", "target term 'verifier' with"),
        ("- predicate: test_yaml:nothing", "cannot import 'test_yaml:nothing'"),
        ("- {log_prob: {of: '{z}'}, weight: heavy}", "weight of a target term must be a number, got 'heavy'"),
        ("- {log_prob: {of: '{z}'}, temperature: warm}", "temperature of a target term must be a number"),
        ("- {log_prob: {of: '{z}'}, temperature: 0}", "temperature of a target term must be positive, got 0"),
        (
            "- {log_prob: {of: '{z}'}, temperature: -1}",
            "temperature of a target term must be positive, got -1",
        ),
        ("- {contains: [a], penalty: much}", "penalty of a target term must be a number, got 'much'"),
        ("log_prob: {of: '{z}'}", "target must be a list of terms"),
        ("[]", "target must be a list of terms"),
        ("contains", "target must be a list of terms"),
    ],
)
def test_bad_targets_say_what_is_wrong(one_lm: LanguageModel, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        target_from_spec(yaml.safe_load(text), one_lm, HERE)
    assert message in str(e.value)


def test_building_a_target_leaves_its_spec_alone(one_lm: LanguageModel) -> None:
    spec = [{"verifier": {"function": "test_yaml:minus_length"}, "weight": 2}]
    before = json.dumps(spec)
    target_from_spec(spec, one_lm, HERE)
    assert json.dumps(spec) == before


# Runs

RUN: dict[str, Any] = {
    "prompt": "{x}",
    "target": [{"log_prob": {"of": "{z}{y}", "given": "{x}"}}],
    "support": {"stop": ".", "max_tokens": 2},
    "data": ROWS,
    "adapter": 2,
    "config": {"max_steps": 1, "num_samples": 2, "diagnose_steps": 0},
}


@pytest.fixture(scope="module")
def model_folder(models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lm = models["llama-untied"]
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def run(tmp_path: Path, model_folder: Path, **changes: Any) -> RunSpec:
    """A spec read from a YAML file; None takes a key out."""
    stated = {"model": str(model_folder), **RUN, **changes}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in stated.items() if v is not None}))
    return RunSpec.from_yaml(file)


def test_a_yaml_file_is_the_same_spec(tmp_path: Path, model_folder: Path) -> None:
    spec = run(tmp_path, model_folder)
    assert spec == RunSpec(**RUN, model=str(model_folder))
    assert spec.to_dict() == {"model": str(model_folder), **RUN}
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(spec.to_dict()))
    assert RunSpec.from_yaml(again) == spec
    defaults = run(tmp_path, model_folder, model=None, adapter=None, config=None)
    assert (defaults.model, defaults.adapter, defaults.config) == ("embedded", 16, {})


def test_a_spec_becomes_a_trainer(tmp_path: Path, model_folder: Path) -> None:
    config = {"max_steps": 3, "num_samples": 5, "learning_rate": "1e-3", "output_dir": "elsewhere"}
    spec = run(tmp_path, model_folder, config=config, adapter=3)
    trainer = spec.trainer(str(tmp_path / "out"))
    assert trainer.args.max_steps == 3
    assert trainer.args.num_samples == 5
    assert trainer.args.learning_rate == 0.001, "YAML reads 1e-3 as a string"
    assert trainer.args.output_dir == str(tmp_path / "out")
    assert trainer.train_dataset == ROWS
    assert trainer.target.to_spec() == [{**RUN["target"][0], "weight": 1.0}]
    assert trainer.policy.prompt.source == "{x}"
    assert trainer.policy.support_spec == Support(stop=".", max_tokens=2)
    assert trainer.policy.model.peft_config["default"].r == 3
    assert run(tmp_path, model_folder, adapter="full").trainer(str(tmp_path)).policy.is_full


def test_a_file_is_checked_with_what_the_command_line_adds(tmp_path: Path) -> None:
    """`max_staleness` is for servers, whose addresses a file need not know."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RUN | {"config": {"max_staleness": 2}}))
    with pytest.raises(ConfigError, match=r"run.yaml: max_staleness=2: a number of updates.* for a server"):
        RunSpec.from_yaml(file)
    spec = RunSpec.from_yaml(file, config={"rollout": ["http://a:1", "http://b:1"]})
    file.write_text(yaml.safe_dump(RUN | {"config": [1]}))
    with pytest.raises(ConfigError, match="config must be a mapping"):
        RunSpec.from_yaml(file, config={"max_steps": 2})
    assert (spec.args("").max_staleness, spec.args("").rollout) == (2, ["http://a:1", "http://b:1"])


def test_overrides_merge_the_config_and_leave_the_spec_alone() -> None:
    spec = RunSpec(**RUN)
    new = spec.with_overrides(model="other", data=None, config={"max_steps": 7, "seed": 1})
    assert new.model == "other"
    assert new.data == ROWS
    assert new.config == {"max_steps": 7, "num_samples": 2, "diagnose_steps": 0, "seed": 1}
    assert spec == RunSpec(**RUN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt: a", "unknown key 'promt'; did you mean 'prompt'?"),
        ("prompt: a\ntarget: []", "support, data missing; a run needs prompt, target, support and data"),
        ("", "must be a mapping with the keys prompt, target"),
        ("- a list", "must be a mapping"),
        ("prompt: [unclosed", "is not valid YAML"),
        ("prompt: a\n  target: b", "is not valid YAML"),
    ],
)
def test_bad_yaml_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        RunSpec.from_yaml(file)
    assert message in str(e.value)
    assert str(file) in str(e.value)


def test_a_yaml_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        RunSpec.from_yaml(tmp_path / "none.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"prompt: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        RunSpec.from_yaml(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": {"max_step": 1}}, ConfigError, "config: unknown key 'max_step'; did you mean 'max_steps'?"),
        ({"config": {"zzz": 1}}, ConfigError, "config: unknown key 'zzz'; no such setting."),
        ({"config": {"max_steps": "ten"}}, ConfigError, "config: max_steps must be a whole number, got 'ten'"),
        ({"config": {"lr_scheduler_type": "ladder"}}, ConfigError, "ladder is not a valid SchedulerType"),
        ({"config": {"temperature_range": 2.0}}, ConfigError, "config: temperature_range must be a list of 2: a number, a number, got 2.0"),
        ({"config": {"objective": "subbt"}}, ConfigError, "unknown objective 'subbt'; did you mean 'subtb'?"),
        ({"config": [1]}, ConfigError, "config must be a mapping of settings, got [1]"),
        ({"support": {"stop": ".", "max_token": 2}}, ConfigError, "support: unknown key 'max_token'; did you mean"),
        ({"support": {"max_tokens": 2}}, ConfigError, "'stop'"),
        ({"support": "."}, ConfigError, "support must be a mapping of settings, got '.'"),
        ({"support": {"stop": " cats"}}, SupportError, "2 tokens"),
        ({"target": [{"contain": ["a"]}]}, ConfigError, "unknown target term 'contain'; did you mean 'contains'?"),
        ({"prompt": "{w}"}, DataError, "row 0 has no column 'w', which a template uses"),
        ({"prompt": "{x}{z}"}, TemplateError, "take {z} out"),
        ({"data": []}, DataError, "data is empty: give at least one row"),
        ({"data": ["a"]}, DataError, "data: row 0 is 'a', not a mapping of column to value"),
        ({"data": 3}, DataError, "data has no rows"),
        ({"model": "no/such/folder"}, ConfigError, "cannot load a causal LM from 'no/such/folder'"),
    ],
)  # fmt: skip
def test_bad_runs_say_what_is_wrong(
    tmp_path: Path, model_folder: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as e:
        run(tmp_path, model_folder, **changes).trainer(str(tmp_path / "out"))
    assert message in str(e.value)


@pytest.mark.parametrize("name", TASKS)
def test_built_in_tasks_are_valid_specs(name: str, tmp_path: Path) -> None:
    spec = load_task(name).SPEC
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(spec.to_dict()))))
    again = RunSpec.from_yaml(file)
    assert again.target == spec.target
    assert again.rows() == spec.rows()


def test_unknown_tasks_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'number'; did you mean 'numbers'\?.*ends in \.yaml"):
        load_task("number")


# Values that YAML or a hand slips in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("Yes", "Yes"), ("off", "off"), ("y", "y"), ("true", True), ("False", False), ("null", None),
        ("2024-01-01", "2024-01-01"), ("2024-01-01 10:00:00", "2024-01-01 10:00:00"), ("1:30", "1:30"),
        ("007", "007"), ("0x10", "0x10"), ("1_000", "1_000"), ("12", 12), ("-3", -3), ("1.5", 1.5), ("1.0e-3", 1e-3),
        ("1e-3", "1e-3"), (".inf", math.inf), ("1.2.3", "1.2.3"), ("'12'", "12"), ("", None), ("a: &k [1]\nb: *k", {"a": [1], "b": [1]}),
        ("a: &k {x: 1}\nb: {<<: *k, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
    ],
)  # fmt: skip
def test_yaml_reads_scalars_as_json_does(text: str, value: Any) -> None:
    assert load_yaml(text, "t") == value
    assert type(load_yaml(text, "t")) is type(value)


@pytest.mark.parametrize("value", ["no", "007", "1:30", "2024-01-01", "1e5", "1e-3", "0o7", "~", "", " a", 1e-5, 1e20, 3, True, None])  # fmt: skip
def test_what_pyyaml_writes_is_read_as_it_was(value: Any) -> None:
    assert load_yaml(yaml.safe_dump({"x": value}), "t") == {"x": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
        ("x:\n  - {a: 1, a: 2}", "line 2: 'a' is given twice"),
        ("&a [*a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        ("!!timestamp 2024-01-01", "line 1: could not determine a constructor"),
        ("!!set {a, b}", "line 1: could not determine a constructor"),
        ("!!binary aGk=", "could not determine a constructor"),
        ("!!bool maybe", "maybe"),
        ("!!int x", "is not valid YAML"),
        ("9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("[" * 5000, "is not valid YAML"),
        ("{[a]: b}", "line 1: found unhashable key"),
        ("a: \x00", "is not valid YAML"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
    ],
)
def test_yaml_that_is_no_data_names_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML") as e:
        load_yaml(text, "t")
    assert message in str(e.value)


def written(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode(encoding))
    return file


RUN_TEXT = """prompt: '{x}'
target: [{log_prob: {of: '{z}', given: '{x}'}}]
support: {stop: STOP, max_tokens: 2}
data: [{x: DATA}]
adapter: ADAPTER
config: {max_steps: STEPS, save_strategy: SAVE, num_samples: 2}
"""


def filled(**values: str) -> str:
    text = RUN_TEXT
    for key, value in {
        "STOP": "'.'",
        "DATA": "a",
        "ADAPTER": "2",
        "STEPS": "1",
        "SAVE": "no",
        **values,
    }.items():
        text = text.replace(key, value)
    return text


@pytest.mark.parametrize("value", ["16", "full"])
def test_the_former_key_of_the_adapter_says_what_to_write(tmp_path: Path, value: str) -> None:
    text = filled().replace("adapter: 2", f"lora: {value}")
    with pytest.raises(
        ConfigError, match=f"run.yaml: the key lora is now called adapter: write `adapter: {value}`"
    ):
        RunSpec.from_yaml(written(tmp_path, text))


def test_words_and_dates_stay_text(tmp_path: Path) -> None:
    spec = RunSpec.from_yaml(written(tmp_path, filled(DATA="2024-01-01", STOP="no")))
    assert spec.rows() == [{"x": "2024-01-01"}]
    assert spec.bare_support().stop == "no"
    assert spec.args("out").save_strategy == "no"
    assert json.dumps(spec.to_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"STOP": "false"}, "support: stop must be text or a whole number or a list (of text or a whole number), got False; to write it as text, quote it: 'false'"),
        ({"STOP": "1.5"}, "support: stop must be text"),
        ({"STEPS": "1.5"}, "config: max_steps must be a whole number, got 1.5"),
        ({"STEPS": "[1]"}, "config: max_steps must be a whole number, got [1]"),
        ({"STEPS": "true"}, "config: max_steps must be a whole number, got True"),
        ({"STEPS": "null"}, "config: max_steps must be a whole number, got None"),
        ({"STEPS": ".nan"}, "config: max_steps must be a whole number, got nan"),
        ({"SAVE": "false"}, "config: save_strategy must be text, got False; to write it as text, quote it: 'false'"),
        ({"ADAPTER": "0"}, "adapter must be a rank of at least 1, or full, got 0"),
        ({"ADAPTER": "half"}, "adapter must be a rank of at least 1, or full, got 'half'"),
        ({"ADAPTER": "1.5"}, "adapter must be a whole number or text, got 1.5"),
        ({"DATA": "[1], 0: 2"}, "data: row 0 has a column named 0, not text"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_refused_by_name(
    tmp_path: Path, values: dict[str, str], message: str
) -> None:
    file = written(tmp_path, filled(**values))
    with pytest.raises(AmortLMError) as e:
        RunSpec.from_yaml(file)
    assert str(e.value).startswith(f"{file}: {message}")


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text: .*save it as UTF-8"):
        RunSpec.from_yaml(written(tmp_path, filled(DATA="Café"), "latin-1"))
    assert RunSpec.from_yaml(written(tmp_path, filled(DATA="Café"), "utf-8-sig")).rows() == [{"x": "Café"}]


ODD: list[Any] = [None, True, -1, 0, 1.5, math.nan, math.inf, 10**30, "", "no", [], [1], [[]], {}, {"a": 1}]


def accepts(tmp_path: Path, then: Callable[[RunSpec], Any], **changes: Any) -> bool:
    """Is the run accepted? Any error but AmortLMError, which is one clear sentence, goes through."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **changes}), encoding="utf-8")
    try:
        then(RunSpec.from_yaml(file))
    except AmortLMError:
        return False
    return True


def sampled_fields() -> list[str]:
    """Every field of ours, and of each kind of annotation in TrainingArguments the first two."""
    own = {f.name for f in fields(GFNConfig)} - {f.name for f in fields(TrainingArguments)}
    kinds = Counter[str]()
    out = []
    for f in fields(GFNConfig):
        kinds[str(f.type)] += 1
        if f.init and (f.name in own or kinds[str(f.type)] <= 2):
            out.append(f.name)
    return out


@pytest.mark.parametrize("name", sampled_fields())
def test_odd_settings_are_never_a_traceback(tmp_path: Path, name: str) -> None:
    config = {"num_samples": 2, "use_cpu": True}
    found = [accepts(tmp_path, lambda spec: None, config={**config, name: value}) for value in ODD]
    assert not all(found)


@pytest.mark.parametrize("name", [f.name for f in fields(Support)])
def test_odd_supports_are_never_a_traceback(tmp_path: Path, one_lm: LanguageModel, name: str) -> None:
    support = {"stop": ".", "max_tokens": 2}
    found = [
        accepts(tmp_path, lambda spec: spec.bare_support().bind(one_lm), support={**support, name: value})
        for value in ODD
    ]
    assert not all(found)


PLACES: dict[str, Callable[[Any], Any]] = {
    "of": lambda v: [{"log_prob": {"of": v, "given": "{x}"}}],
    "given": lambda v: [{"log_prob": {"of": "{z}", "given": v}}],
    "weight": lambda v: [{"log_prob": {"of": "{z}"}, "weight": v}],
    "temperature": lambda v: [{"log_prob": {"of": "{z}"}, "temperature": v}],
    "penalty": lambda v: [{"contains": "a", "penalty": v}],
    "minimum": lambda v: [{"length": {"minimum": v}}],
    "maximum": lambda v: [{"length": {"maximum": v}}],
    "function": lambda v: [{"verifier": {"function": v}}],
    "every_prefix": lambda v: [{"verifier": {"function": "test_yaml:minus_length", "every_prefix": v}}],
    "unordered target": lambda v: [{"unordered": {"target": v, "separator": " a"}}],
    "separator": lambda v: [{"unordered": {"target": [{"log_prob": {"of": "{z}"}}], "separator": v}}],
    "a term": lambda v: [v],
    "all": lambda v: v,
    **{name: lambda v, name=name: [{name: v}] for name in ARGUMENTS},
}


@pytest.mark.parametrize("place", PLACES)
def test_odd_targets_are_never_a_traceback(tmp_path: Path, one_lm: LanguageModel, place: str) -> None:
    def score(spec: RunSpec) -> None:
        rollouts = random_rollouts(one_lm, SUPPORT, ROWS, per_row=2)
        target_from_spec(spec.target, one_lm).score(rollouts)

    found = [accepts(tmp_path, score, target=PLACES[place](value)) for value in ODD]
    assert not all(found)


@pytest.mark.parametrize("name", ["prompt", "data", "adapter", "config", "support", "target"])
def test_odd_runs_are_never_a_traceback(tmp_path: Path, model_folder: Path, name: str) -> None:
    def build(spec: RunSpec) -> None:
        spec.trainer(str(tmp_path / "out"))

    found = [accepts(tmp_path, build, model=str(model_folder), **{name: value}) for value in ODD]
    assert not all(found)


def test_a_data_path_is_relative_to_the_yaml_file(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"x": "here"}\n')
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data" / "rows.jsonl").write_text('{"x": "not here"}\n')
    monkeypatch.chdir(elsewhere)
    assert run(tmp_path, model_folder, data="data/rows.jsonl").rows() == [{"x": "here"}]
    absolute = str(elsewhere / "data" / "rows.jsonl")
    assert run(tmp_path, model_folder, data=absolute).rows() == [{"x": "not here"}]


def test_temperature_in_yaml_is_a_division_not_a_product(one_lm: LanguageModel) -> None:
    plain = scored(one_lm, "- log_prob: {of: '{z}'}")
    halved = scored(one_lm, "- {log_prob: {of: '{z}'}, temperature: 2}")
    assert math.isclose(plain.sum().item(), 2 * halved.sum().item(), rel_tol=1e-5)
