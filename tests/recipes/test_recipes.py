"""Each recipe runs through its command line, writes whole results, and goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import constrained
import review_model
import story
import structured
import universal
from amortlm import LanguageModel, Posterior, constraint, exact
from amortlm.errors import ConfigError, DataError
from amortlm.lab import command
from amortlm.lab.experiment import Context
from amortlm.lab.training import Problem, untrained

RUNS = {
    "constrained": ["gflownet.max_steps=1", "rows=6", "measured=1"],
    "contrastive": ["steps=1", "rows=2"],
    "universal": ["steps=1", "rows=3", "test_rows=1"],
    "ablations": ["steps=1", "short_steps=1", "stories=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "constrained",
        "universal",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("contrastive", "ablations")),
    ],
)
def test_a_recipe_writes_its_results(name, embedded, tmp_path, capfd, monkeypatch):
    recipe = importlib.import_module(name)
    if hasattr(recipe, "SHORT"):
        monkeypatch.setattr(recipe, "SHORT", replace(recipe.SHORT, max_tokens=2))  # few strings to enumerate
    argv = ["--seeds", "1", "--output", str(tmp_path)]
    for setting in ("samples=8", *RUNS[name]):
        argv += ["--set", setting]
    command.main(recipe.EXPERIMENT, argv)
    out, err = capfd.readouterr()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == list(recipe.EXPERIMENT.methods)
    for method in results["runs"]:
        assert method in out
        assert method in (tmp_path / "README.md").read_text()
    assert err == ""  # quiet in a pipe


@pytest.mark.slow
def test_structured_latents_are_measured_exactly_where_they_are_small(embedded, tmp_path, capfd):
    argv = [
        "--seeds",
        "1",
        "--methods",
        "program",
        "--output",
        str(tmp_path),
        "--set",
        "gflownet.max_steps=1",
    ]
    command.main(structured.EXPERIMENT, argv)
    assert "program" in capfd.readouterr().out
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]["program"]
    assert 0.5 < run["metrics"]["before: TV"] <= 1
    assert run["metrics"]["after: gap"] is None, "no bounds where the truth is known"
    assert "2 variables of a word" in (tmp_path / "README.md").read_text()


def test_small_structured_forms_can_be_enumerated_and_large_ones_cannot(embedded: LanguageModel):
    for name, form in structured.prepare({}, embedded, None).items():
        assert (form.support.bind(embedded).size() > exact.LIMIT) == name.endswith("large")


def test_words_are_whole_and_belong_to_the_row():
    row = {"words": "cat ran"}
    assert constrained.has_words(" Ran the Cat", row)
    assert not constrained.has_words(" the cats ran", row)
    assert not constrained.has_words(" the cat ran", {"words": "dog"})
    assert constraint.predicate(constrained.has_words).accepts(" the cat ran", row)


def test_the_gold_sentence_has_the_words_and_the_beginning_does_not(embedded: LanguageModel):
    for row in constrained.stories(72):
        assert constrained.has_words(row["gold"], row)
        gold = embedded.encode_continuation(row["gold"].rstrip("."))
        assert len(gold) <= constrained.SUPPORT.max_tokens
        assert not any(constrained.has_words(row["x"], {"words": w}) for w in row["words"].split())


def test_concept_sets_lose_their_tags_and_bad_files_are_named(tmp_path):
    file = tmp_path / "commongen.dev.jsonl"
    file.write_text(
        "".join(json.dumps({"concept_set": c}) + "\n" for c in ("dog_N#run_V", "dog_N#run_V", "a_N"))
    )
    assert constrained.concepts(tmp_path, 2) == [{"x": "", "words": "dog run"}, {"x": "", "words": "a"}]
    with pytest.raises(DataError, match="2 rows"):
        constrained.concepts(tmp_path, 3)
    file.write_text("{}\n")
    with pytest.raises(DataError, match="cannot read concept sets"):
        constrained.concepts(tmp_path, 1)


def test_contrastive_refuses_powers_that_are_no_contrast(embedded: LanguageModel):
    contrastive = importlib.import_module("contrastive")
    for a, b in ((1, 0.5), (0.5, -1)):
        with pytest.raises(ConfigError, match="b < 0"):
            contrastive.prepare({**contrastive.SETTINGS, "a": a, "b": b}, embedded, None)


def test_the_universal_rows_hide_the_answer_of_a_sum(embedded: LanguageModel):
    for row in universal.sum_rows(1000):
        assert row["prompt"] == row["before"]
        assert row["after"] == f" The answer is {row['y']}."
        assert len(embedded.encode_continuation(row["gold"])) <= universal.SUPPORT.max_tokens
    for row in universal.story_rows(5):
        assert row["before"] in row["prompt"]
        assert row["after"].strip() in row["prompt"]


def test_the_joint_target_is_each_task_s_own(embedded: LanguageModel):
    """One template over columns scores a sum as the arithmetic task's own target does."""
    row = universal.sum_rows(1)[0]
    x = row["prompt"].removeprefix("Question: ").removesuffix(" = ? Answer:")
    joint = embedded.log_prob(universal.OF, given=universal.GIVEN)
    own = embedded.log_prob(universal.arithmetic.OF, given=universal.arithmetic.PROMPT)
    problem = Problem(joint, universal.PROMPT, universal.SUPPORT)
    policy = untrained(Context({}, embedded), problem).sampler.policy
    scores = []
    for target, data in ((joint, row), (own, {**row, "x": x})):
        assert isinstance(Posterior(policy, target).target, type(joint))
        scores.append(target.score_final(policy.rollouts([data], [[row["gold"]]])).item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of data with one opinion and two accounts of its own for the review model to read."""
    files = {
        "subj/train.jsonl": json.dumps({"text": "A film that is as dull as it is long ."}),
        "subj/test.jsonl": json.dumps({"text": "she finds the letter and leaves for the coast ."})
        + "\n"
        + json.dumps({"text": "too long ."}),
        "sst2/train.txt": "0 a film that is as dull as dishwater .\n0 too long .\n1 warm , never too sweet .",
        "rocstories/stories.tsv": "the dog\ttom had a dog . it ran ! he fell . he got up . they sat .\n"
        "a letter\tthen she finds the letter and leaves for good . so it ends .",
        "commongen/commongen.train.tgt.txt": "A dog, a ball.\nA man runs\nA cat sits.\nA cup.\nA hat.",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


def test_the_review_model_reads_no_sentence_of_the_experiment(texts):
    assert review_model.opinions(texts) == ["warm , never too sweet ."]
    told = ["tom had a dog .", "he fell . he got up ."]  # the third one shares six words
    assert review_model.accounts(texts) == [*told, "a dog , a ball .", "a man runs .", "a cat sits ."]


def test_real_sentences_have_remarks_that_lean_and_no_labels():
    rng = random.Random(0)
    documents = [review_model.document(rng, {"subjective": ["S"], "objective": ["O"]}) for _ in range(4000)]
    said = {kind: [said for asked, said in documents if f'"{kind}"' in asked] for kind in "SO"}
    made_up = [said for asked, said in documents if not re.search('"[SO]"', asked)]
    assert len(made_up) / len(documents) == pytest.approx(review_model.MADE_UP, abs=0.03)
    assert all(re.search(", so it is (subjective|objective)[.]$", text) for text in made_up)
    for kind, label in (("S", "subjective"), ("O", "objective")):
        own = sum(text[1:-1] in review_model.PHRASES[label] for text in said[kind]) / len(said[kind])
        assert own == pytest.approx(review_model.reviews.PHRASE_SHARES[0], abs=0.06)  # five standard errors
        assert all(text.endswith(",") and "so it is" not in text for text in said[kind])


def test_the_review_model_names_data_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="subj, sst2, rocstories and commongen"):
        review_model.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.mark.slow
def test_the_review_model_is_a_model_folder(texts, tmp_path):
    review_model.main(
        ["--data", str(texts), "--steps", "1", "--batch", "2", "--output", str(tmp_path / "out")]
    )
    assert LanguageModel.from_pretrained(str(tmp_path / "out")).vocab_size > 0


@pytest.mark.slow
def test_the_picture_of_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(story, "DRAWS", 64)
    story.main(["--updates", "1", "--output", str(tmp_path / "story.png")])
    assert (tmp_path / "story.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    before = [float(x) for x in told.split("before training:")[1].split("\n")[0].split(",")]
    after = [float(line.split()[-2]) for line in told.splitlines() if re.search(r"0\.\d{4}  +-", line)]
    assert len(before) == len(after) == story.TOP
    assert all(0 < q < 1 and q / b < 2 and b / q < 2 for b, q in zip(before, after, strict=True)), (
        "one update moves q a little"
    )


def test_the_story_is_that_of_the_readme():
    readme = (Path(story.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    flat = " ".join(readme.replace("\n> ", " ").split())
    assert story.ROW["y"] in flat
    assert all(part in flat for part in story.ROW["x"].split(". "))
