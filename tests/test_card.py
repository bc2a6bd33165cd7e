"""The model card of a saved posterior: its metadata, its figures, and texts that try to break out of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from reference import tiny_lm, tiny_policy, tiny_tokenizer
from trainers import make_trainer

from amortlm import LanguageModel, Posterior, Support, card, constraint
from amortlm.card.figures import percent
from amortlm.card.markdown import cell, fenced
from amortlm.diagnostics import certificate
from amortlm.errors import DataError

ROW = {"x": "the dog", "y": " ran"}
ROWS = [ROW, {"x": "a", "y": " a cat"}]
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=(" a", " cat", " dog", "s"))
HOSTILE = "---\nlicense: evil\n---\n```\n````\n| a | b |\n<script>alert(1)</script> [x](http://x.org) *b* _c_ www.x.org \x1b[31m"


def make(lm: LanguageModel, adapter: str | None = None, **more: Any) -> Posterior:
    target = lm.log_prob("{z}{y}", given="{x}") / 0.8
    return Posterior(
        tiny_policy(lm, more.get("prompt", "{y}{x}"), SUPPORT, adapter), more.get("target", target)
    )


def load(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def named() -> LanguageModel:
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False)
    lm.name = "maker/tiny"
    return lm


# Metadata


def test_metadata(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    posterior.save_pretrained(tmp_path, rows=ROWS, diagnosis=posterior.diagnose(ROWS, 64))
    data = load(tmp_path).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "maker/tiny",
        "peft",
        "text-generation",
    )
    assert {"amortlm", "gflownet"} <= set(data.tags)
    assert "license" not in data.to_dict(), "it is not known"


def test_the_model_index_has_the_worst_row(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    diagnosis = posterior.diagnose(ROWS, 64)
    posterior.save_pretrained(tmp_path, rows=ROWS, diagnosis=diagnosis)
    figures = {r.metric_type: r.metric_value for r in load(tmp_path).data.eval_results}
    reports = [row.to_dict() for row in diagnosis.rows]
    assert figures == {
        "tv_high": float(f"{max(r['tv_high'] for r in reports):.4g}"),
        "gap": float(f"{max(r['gap'] for r in reports):.4g}"),
        "ess": float(f"{min(r['ess'] for r in reports):.4g}"),
    }


def test_figures_that_are_infinite_are_left_out(named: LanguageModel, tmp_path: Path) -> None:
    target = named.log_prob("{z}{y}", given="{x}") + constraint.contains("dog")
    posterior = make(named, target=target)
    diagnosis = posterior.diagnose(ROWS, 64)
    assert all(row.distance is not None and row.distance.kl_qp == float("inf") for row in diagnosis.rows)
    posterior.save_pretrained(tmp_path, rows=ROWS, diagnosis=diagnosis)
    assert ".inf" not in yaml.safe_dump(load(tmp_path).data.to_dict())
    assert "| ∞ |" in load(tmp_path).text


def test_the_embedded_model_has_no_hub_id(embedded: LanguageModel, tmp_path: Path) -> None:
    posterior = Posterior(tiny_policy(embedded, "{x}", Support(stop=".", max_tokens=2)), None)
    posterior.save_pretrained(tmp_path, rows=[{"x": "One day"}])
    found = load(tmp_path)
    assert "base_model" not in found.data.to_dict()
    assert found.data.license == "apache-2.0", "as its own card says"
    assert "the language model that ships with amortlm" in found.text


def test_a_full_model_is_one_of_transformers(named: LanguageModel, tmp_path: Path) -> None:
    make(named, "full").save_pretrained(tmp_path)
    assert load(tmp_path).data.library_name == "transformers"
    assert "PeftModel" not in load(tmp_path).text


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "base"
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False)
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    lm = LanguageModel.from_pretrained(base, device="cpu")
    make(lm).save_pretrained(tmp_path / "out", rows=ROWS)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "secret" not in text
    assert str(Path.home()) not in text
    assert "base_model" not in load(tmp_path / "out").data.to_dict()
    assert "not on the hub (llama" in text


# What it says


def test_prompt_target_and_support_as_written(named: LanguageModel, tmp_path: Path) -> None:
    make(named).save_pretrained(tmp_path)
    stated = yaml.safe_load(re.search(r"```yaml\n(.*?)```", load(tmp_path).text, re.DOTALL)[1])
    assert stated == {
        "prompt": "{y}{x}",
        "target": [{"log_prob": {"of": "{z}{y}", "given": "{x}"}, "weight": 1.25}],
        "support": {"stop": ".", "max_tokens": 3, "allowed_tokens": [" a", " cat", " dog", "s"]},
    }


def test_samples_are_those_of_the_sampler(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    posterior.save_pretrained(tmp_path, rows=ROW)
    samples = posterior.sample(ROW, 64, seed="card")
    lines = re.findall(r"^\| (.+) \| (-?[\d.]+) \| ([\d.]+) \|$", load(tmp_path).text, re.MULTILINE)
    expected = [(cell(s.text), f"{s.log_q:.2f}", f"{s.weight * 64:.2f}") for s in samples[:4]]
    assert lines == expected
    assert f"| 0 | {percent(samples.ess / 64)} | {samples.log_z:.3g} |" in load(tmp_path).text


def test_at_most_four_rows(named: LanguageModel, tmp_path: Path) -> None:
    make(named).save_pretrained(tmp_path, rows=[{"x": letter, "y": " ran"} for letter in "abcdef"])
    assert re.findall(r"Row (\d):", load(tmp_path).text) == ["0", "1", "2", "3"]


def test_a_diagnosis_of_more_rows_is_shown_whole(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    rows = [{"x": letter, "y": " ran"} for letter in "abcdef"]
    posterior.save_pretrained(tmp_path, rows=rows, diagnosis=posterior.diagnose(rows, 16))
    assert len(re.findall(r"^\| \d \| ", load(tmp_path).text, re.MULTILINE)) == 6
    assert "about 6 rows" in load(tmp_path).text
    posterior.save_card(tmp_path, ROW, posterior.diagnose(ROW, 16))
    assert "about one row" in load(tmp_path).text


def test_a_diagnosis_of_other_rows_is_refused(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    with pytest.raises(DataError, match="a diagnosis of 2 rows for 1 rows"):
        posterior.save_pretrained(tmp_path, rows=[ROW], diagnosis=posterior.diagnose(ROWS, 16))


def test_a_target_that_is_not_saved_is_named(named: LanguageModel, tmp_path: Path) -> None:
    target = named.log_prob("{z}", given="{x}") + constraint.predicate(lambda text: True)
    make(named, target=target).save_pretrained(tmp_path)
    assert "It is not saved with the weights" in load(tmp_path).text


def test_functions_are_named_with_the_trust_they_need(named: LanguageModel, tmp_path: Path) -> None:
    target = named.log_prob("{z}", given="{x}") + constraint.predicate(short)
    make(named, target=target).save_pretrained(tmp_path)
    assert f'trust=["{__name__}"]' in load(tmp_path).text
    assert (
        f"The target calls {cell(f'{__name__}:short')}, which is not in this repository"
        in load(tmp_path).text
    )


def short(text: str) -> bool:
    return len(text) < 9


def test_the_code_of_a_card_is_python(named: LanguageModel, tmp_path: Path) -> None:
    for adapter in (None, "full"):
        make(named, adapter).save_pretrained(tmp_path / str(adapter))
        found = re.findall(r"```python\n(.*?)```", load(tmp_path / str(adapter)).text, re.DOTALL)
        assert [len(code.splitlines()) for code in found] == [3, 3 if adapter is None else 2]
        for code in found:
            compile(code, "card", "exec")


# Texts that try to break out


def test_hostile_texts_stay_text(
    named: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"x": HOSTILE, "y": HOSTILE}
    # The tokenizer of the tests has no such letters; what a model writes is hostile here by other means.
    monkeypatch.setattr(Posterior, "texts", lambda self, rollouts: [HOSTILE] * len(rollouts))
    support = Support(stop=".", max_tokens=2)
    target = named.log_prob("{z}", given="---\n```\n| {x} |") + constraint.contains(HOSTILE, penalty=1)
    posterior = Posterior(tiny_policy(tiny_reader(named), "<b>{y}</b>\n---\n```", support), target)
    posterior.save_pretrained(tmp_path, rows=[row])
    found = load(tmp_path)
    assert "license" not in found.data.to_dict()
    outside = without_blocks(found.text)
    for mark in ("<script", "alert(1)</", "](http://x", "www.x", "\x1b", "*b*", "evil\n---"):
        assert mark not in outside, mark
    lines = [line for line in outside.splitlines() if "&#60;script" in line]
    assert len(lines) == 4
    assert all(line.count("|") == 4 for line in lines), "three cells each"
    blocks = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", found.text, re.DOTALL | re.MULTILINE)
    assert [sorted(yaml.safe_load(text)) for _, text in blocks] == [
        ["prompt", "support", "target"],
        ["x", "y"],
    ]
    assert yaml.safe_load(blocks[1][1]) == row


def tiny_reader(lm: LanguageModel) -> LanguageModel:
    """The model, with an encoder that reads any text as a few letters."""
    lm.encode_prompt = lambda prompt, row: [2, 3, 4]  # type: ignore[method-assign]
    lm.codec.encode_prompt = lm.encode_prompt  # type: ignore[method-assign]
    return lm


def without_blocks(text: str) -> str:
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", ["", "`", "```", "a\n````\nb", "~~~\n```python"])
def test_a_fence_is_longer_than_any_in_the_text(text: str) -> None:
    lines = fenced(text, "yaml").splitlines()
    assert lines[0] == lines[-1] + "yaml"
    assert set(lines[-1]) == {"`"}
    assert not any(line.startswith(lines[-1]) for line in lines[1:-1])


def test_a_cell_is_one_line_without_marks() -> None:
    assert cell("a|b\n`c` <d>") == "a&#124;b↵&#96;c&#96; &#60;d&#62;"
    assert cell("naïve 名, it's (ok).") == "naïve 名, it's (ok)."


# Cards of others, and of the trainer


def test_an_edited_card_stays(named: LanguageModel, tmp_path: Path) -> None:
    posterior = make(named)
    posterior.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    posterior.save_pretrained(tmp_path, rows=ROW)
    second = (tmp_path / "README.md").read_text()
    assert "## Samples" in second
    assert "## Samples" not in first
    edited = second.replace(card.MARK, "My words.")
    (tmp_path / "README.md").write_text(edited)
    posterior.save_pretrained(tmp_path)
    posterior.save_card(tmp_path, ROW)
    kept = (tmp_path / "README.md").read_text()
    assert "My words." in kept
    assert "## Samples" in kept


@pytest.mark.slow
def test_the_trainer_writes_samples_of_its_rows(named: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(named, tmp_path, max_steps=1)
    trainer.train()
    text = load(tmp_path).text
    assert re.findall(r"Row (\d):", text) == ["0", "1", "2", "3"]
    assert "an estimate, not a verdict" in text


@pytest.mark.slow
def test_a_certificate_is_cited_and_its_figures_are_shown(named: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(named, tmp_path, max_steps=2, diagnose_steps=1, stop_at_gap=1e3, support=SUPPORT)
    trainer.train()
    text = load(tmp_path).text
    assert certificate.hash_file(tmp_path) in text
    assert "| verdict |" in text
    assert {r.metric_type for r in load(tmp_path).data.eval_results} >= {"gap", "ess"}
    trainer.posterior.policy.model.get_parameter(lora_b(trainer.posterior)).data.add_(1.0)
    trainer.posterior.save_pretrained(tmp_path, rows=trainer.train_dataset)
    assert "ertificate" not in load(tmp_path).text, "it is about other weights"


def lora_b(posterior: Posterior) -> str:
    return next(name for name, p in posterior.policy.model.named_parameters() if "lora_B" in name)
