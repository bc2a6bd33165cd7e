"""The page about a run says what its files say, whatever texts and figures they hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Support
from amortlm.errors import CheckpointError
from amortlm.report import is_measured, measure, write_report
from amortlm.report.page import report
from amortlm.report.record import RunRecord
from amortlm.report.verdict import verdict

SETTINGS: dict[str, Any] = {
    "rows": ROWS[:2],
    "diagnose_steps": 2,
    "max_steps": 4,
    "support": Support(stop=".", max_tokens=2),
}


class Page(HTMLParser):
    """Texts, tags and addresses of a page; fails where tags do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.addresses = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())


@pytest.fixture
def run(one_lm: LanguageModel, tmp_path: Path) -> Path:
    make_trainer(one_lm, tmp_path / "run", **SETTINGS).train()
    return tmp_path / "run"


def test_training_writes_a_report(run: Path) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    for stated in ("log p('{z}{y}' | '{x}')", "Support(stop='.', max_tokens=2)", "{x}{y}", ROWS[0]["x"]):
        assert stated in text
    assert "Trained, not yet measured." in text
    assert "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses), "the page needs no network"
    record = RunRecord.read(run)
    assert record.finished
    assert [look["step"] for look in record.looks] == [0, 0, 2, 2, 4, 4]
    for sample in record.after[0]["samples"]:
        assert sample["text"].strip() in text


def test_looks_are_those_of_the_posterior(one_lm: LanguageModel, tmp_path: Path) -> None:
    """The figures of the last look are an estimate of the saved posterior, and the log weights are log R - log q."""
    trainer = make_trainer(one_lm, tmp_path, **SETTINGS)
    trainer.train()
    for row, look in zip(ROWS[:2], RunRecord.read(tmp_path).after, strict=True):
        found = trainer.posterior.estimate(row, 64, seed=("diagnose", 42))
        assert look["ess"] == pytest.approx(found.ess, rel=1e-5)
        assert look["elbo"] == pytest.approx(sum(look["log_weights"]) / 64, rel=1e-5)
        assert look["elbo"] == pytest.approx(found.elbo, rel=1e-5)


def test_a_measured_run_has_the_verdict_of_its_diagnosis(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, **SETTINGS)
    trainer.train()
    assert not is_measured(tmp_path, 64, 0)
    measure(trainer.posterior, tmp_path, 64)
    assert is_measured(tmp_path, 64, 0)
    assert not is_measured(tmp_path, 128, 0)
    diagnosis = trainer.posterior.diagnose(ROWS[:2], 64)
    record = RunRecord.read(tmp_path)
    for row, found in zip(record.diagnosis, diagnosis.rows, strict=True):
        assert row["exact_log_z"] == pytest.approx(found.exact_log_z)
        assert row["total_variation"] == pytest.approx(found.tv_high)
    worst = max(found.tv_high for found in diagnosis.rows)
    assert f"Exactly {100 * worst:.0f} %" in verdict(record).detail
    assert write_report([tmp_path]).read_text(encoding="utf-8").count("<svg") > 6
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert not is_measured(tmp_path, 64, 0), "a diagnosis of other weights does not count"


def row(verdict: str, tv: float | None, correct: str | None = None) -> dict[str, Any]:
    return {"verdict": verdict, "tv_high": tv, "correct": correct, "row": {}}


@pytest.mark.parametrize(
    ("rows", "kind", "detail"),
    [
        (
            [row("trust it", 0.04), row("trust it", 0.2)],
            "good",
            "At most 20 % of the probability of the worst prompt",
        ),
        ([row("trust it", 0.04) | {"total_variation": 0.04}], "good", "Exactly 4.0 %"),
        ([row("trust it", 0.1), row("use with correction", 0.5, "sir")], "correct", "on 1 of 2 prompts"),
        ([row("trust it", 0.1), row("do not use", None)], "bad", "On 1 of 2 prompts"),
        ([row("do not use", 1.0)], "bad", "On the prompt it could not be shown"),
        ([], "open", "amortlm report"),
    ],
)
def test_the_verdict_is_that_of_the_worst_prompt(rows: list[dict[str, Any]], kind: str, detail: str) -> None:
    found = verdict(RunRecord("run", True, {}, {}, [], [], rows, None))
    assert found.kind == kind
    assert detail in found.detail
    assert verdict(RunRecord("run", False, {}, {}, [], [], rows, None)).kind == "open"


def test_texts_of_others_stay_text(run: Path) -> None:
    """Rows, completions, targets and settings may hold anything, also in the fields of figures."""
    evil = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }} {% raw %} </td></div>"
    looks = [json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()]
    for look in looks:
        look["row"] = {"x": evil, evil: "value"}
        for sample in look["samples"]:
            sample["text"] = evil
    (run / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    stated = json.loads((run / "run.json").read_text())
    stated["about"] |= {
        "target": evil,
        "support": evil,
        "prompt": [{"role": evil, "content": evil}],
        "model": evil,
    }
    stated["identity"]["settings"]["optim"] = evil
    (run / "run.json").write_text(json.dumps(stated))
    page = Page(write_report([run]).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.texts.count(evil) >= 12


def test_figures_that_are_not_finite(run: Path) -> None:
    """A target that rejects everything has no ELBO and no weights."""
    looks = [json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()]
    for look in looks:
        look |= {"elbo": None, "log_z": None, "log_reward": None, "ess": 0.0, "log_weights": [None] * 64}
        for sample in look["samples"]:
            sample["weight"] = 0.0
    (run / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    assert "–" in Page(write_report([run]).read_text(encoding="utf-8")).texts


def test_several_runs_side_by_side(run: Path, one_lm: LanguageModel, tmp_path: Path) -> None:
    make_trainer(one_lm, tmp_path / "other", **{**SETTINGS, "learning_rate": 0.03}).train()
    path = write_report([run, tmp_path / "other"], tmp_path / "both.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts.count("other") > 3
    settings = page.texts[page.texts.index("learning_rate") :]
    assert [t for t in settings if t][:3] == ["learning_rate", "0.01", "0.03"], "what differs comes first"
    assert not (tmp_path / "other" / "both.html").exists()


def test_without_looks_in_training_nothing_is_said_about_before(
    one_lm: LanguageModel, tmp_path: Path
) -> None:
    make_trainer(one_lm, tmp_path, **{**SETTINGS, "diagnose_steps": 0}).train()
    record = RunRecord.read(tmp_path)
    assert record.before == []
    assert len(record.after) == 2
    assert "(ESS) is " in verdict(record).detail
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "after training" in page.texts
    assert "before training" not in page.texts
    row = [text for text in page.texts[page.texts.index("effective samples") :] if text][:3]
    assert row[1] == "–"
    assert row[2].endswith("%")


def test_a_run_that_goes_on(run: Path) -> None:
    stated = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(stated | {"finished": False}))
    (run / "trainer_state.json").unlink()
    with (run / "looks.jsonl").open("a") as file:
        file.write('{"step": 5, "row": {"x"')  # cut short
    record = RunRecord.read(run)
    assert record.history == []
    assert record.after[0]["step"] == 4
    assert "Training is not finished." in report([record])


def test_a_resumed_run_counts_each_look_once(run: Path) -> None:
    lines = (run / "looks.jsonl").read_text().splitlines()
    changed = json.loads(lines[-1]) | {"distinct": 1}
    (run / "looks.jsonl").write_text("\n".join([*lines, json.dumps(changed)]) + "\n")
    record = RunRecord.read(run)
    assert len(record.looks) == len(lines)
    assert record.after[-1]["distinct"] == 1


def test_a_run_of_an_earlier_version(run: Path) -> None:
    """It states its identity only."""
    stated = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in stated.items() if k != "about"}))
    assert "{&#39;stop&#39;: &#39;.&#39;" in write_report([run]).read_text(encoding="utf-8")


def test_what_was_chosen_is_said(run: Path) -> None:
    stated = json.loads((run / "run.json").read_text())
    stated["about"]["chosen"] = ["objective='subtb'", "num_samples=8"]
    (run / "run.json").write_text(json.dumps(stated))
    text = " ".join(Page(write_report([run]).read_text(encoding="utf-8")).texts)
    assert "Rows of data: 2. Chosen: objective='subtb'. Chosen: num_samples=8." in text


def test_folders_that_hold_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report([tmp_path])
    for name in ("run.json", "trainer_state.json"):
        text = (run / name).read_text()
        (run / name).write_text(text[:40])
        with pytest.raises(CheckpointError, match="is damaged"):
            write_report([run])
        (run / name).write_text(text)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = write_report([run]).read_text(encoding="utf-8")
    assert write_report([run]).read_text(encoding="utf-8") == first
    ids = re.findall(r' id="([^"]+)"', first)
    assert len(ids) == len(set(ids))


def test_a_local_model_is_named_without_its_path(one_lm: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "my-model"
    one_lm.model.save_pretrained(folder)
    one_lm.tokenizer.save_pretrained(folder)
    lm = LanguageModel.from_pretrained(folder)
    make_trainer(lm, tmp_path / "run", **SETTINGS).train()
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "my-model" in text
    assert "secret" not in text
