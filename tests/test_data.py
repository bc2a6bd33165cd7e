"""What people hold rows in, and the files they come from: taken as it is, or refused with what to write instead."""

from __future__ import annotations

import ast
import csv
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from amortlm import EM, GFNConfig, GFNTrainer, LanguageModel, Posterior
from amortlm.data import as_row, as_rows, check_rows, load_rows, rows_or_row
from amortlm.errors import DataError
from amortlm.lab.baselines.decoding import decode
from amortlm.lab.baselines.ppo import PPOConfig, train_ppo
from amortlm.lab.baselines.sft import examples
from amortlm.policy import Policy
from amortlm.support import Support

ROWS = [{"x": "the dog", "y": " ran"}, {"x": "a", "y": " a cat"}]
TABLE = datasets.Dataset.from_list(ROWS)
SUPPORT = Support(stop=".", max_tokens=2)


class MapStyle(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> dict[str, str]:
        return ROWS[i]


class Polars:
    """The part of a polars DataFrame that matters here."""

    columns = ("x", "y")

    def to_dicts(self) -> list[dict[str, str]]:
        return ROWS


def stream() -> Iterator[dict[str, str]]:
    yield from ROWS


HOLDERS: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple of other mappings": lambda: (OrderedDict(ROWS[0]), UserDict(ROWS[1])),
    "dict values": lambda: dict(enumerate(ROWS)).values(),
    "Dataset": lambda: TABLE,
    "a split of a DatasetDict": lambda: datasets.DatasetDict(train=TABLE)["train"],
    "DataFrame": lambda: pd.DataFrame(ROWS),
    "DataFrame with an index of its own": lambda: pd.DataFrame(ROWS, index=[7, 7]),
    "list of Series": lambda: [row for _, row in pd.DataFrame(ROWS).iterrows()],
    "array of dicts": lambda: np.array(ROWS, dtype=object),
    "map-style torch dataset": MapStyle,
    "Arrow table": lambda: pa.Table.from_pylist(ROWS),
    "polars": Polars,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_rows_are_taken_from_what_holds_them(kind: str) -> None:
    rows = as_rows(HOLDERS[kind](), "train_dataset")
    assert rows == ROWS
    assert all(type(row) is dict for row in rows)


def test_rows_are_copies() -> None:
    given = [{"x": "a"}]
    as_rows(given)[0]["x"] = "b"
    assert given == [{"x": "a"}]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DatasetDict": (
        lambda: datasets.DatasetDict(train=TABLE, test=TABLE),
        r"t contains the splits 'train', 'test': give one, dataset\['train'\]",
    ),
    "streamed splits": (
        lambda: datasets.IterableDatasetDict(a=TABLE.to_iterable_dataset()),
        "the splits 'a'",
    ),
    "IterableDataset": (
        lambda: TABLE.to_iterable_dataset(),
        r"t is a stream .*give list\(...\) .*\.take\(n\)",
    ),
    "generator": (stream, r"t is a stream \(generator\).*list\(...\)"),
    "map": (lambda: map(dict, ROWS), "t is a stream"),
    "one row": (lambda: ROWS[0], r"t is one mapping; give a list of rows"),
    "one Series": (lambda: pd.Series(ROWS[0]), "t is one mapping; give a list of rows"),
    "columns": (lambda: {"x": ["a", "b"]}, r"datasets\.Dataset\.from_dict\(...\) of a mapping of columns"),
    "a path": (
        lambda: "rows.jsonl",
        r"give rows, \[\{column: value, .*load_rows\('rows.jsonl'\) reads a file",
    ),
    "a Path": (lambda: Path("rows.jsonl"), r"load_rows\('rows.jsonl'\) reads a file"),
    "None": (lambda: None, "t has no rows; .*not None"),
    "a number": (lambda: 3, "t has no rows"),
    "nothing": (list, "t is empty: give at least one row"),
    "an empty DataFrame": (lambda: pd.DataFrame(columns=["x"]), "t is empty"),
    "texts": (lambda: ["a", "b"], "t: row 0 is 'a', not a mapping of column to value"),
    "a text among rows": (lambda: [ROWS[0], "b"], "t: row 1 is 'b', not a mapping"),
    "lists": (lambda: [[1] * 100], "t: row 0 is a list, not a mapping"),
    "a column named 0": (lambda: [{"x": "a", 0: "b"}], "t: row 0 has a column named 0, not text: rename it"),
    "a DataFrame without names": (lambda: pd.DataFrame([["a", "b"]]), "a column named 0, not text"),
    "two columns x": (
        lambda: pd.DataFrame([["a", "b"]], columns=["x", "x"]),
        "t has more than one column 'x'",
    ),
    "a Series with two x": (
        lambda: [pd.Series(["a", "b"], index=["x", "x"])],
        "row 0 has more than one column 'x'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_rows_is_refused_with_a_remedy(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(DataError, match=message) as e:
        as_rows(make(), "t")
    assert "\n" not in str(e.value)


def test_one_row() -> None:
    assert as_row(pd.Series(ROWS[0])) == as_row(UserDict(ROWS[0])) == ROWS[0]
    assert rows_or_row(pd.Series(ROWS[0])) == rows_or_row(ROWS[0]) == [ROWS[0]]
    assert rows_or_row(pd.DataFrame(ROWS)) == rows_or_row(tuple(ROWS)) == ROWS
    for bad in ("the dog", None, ROWS, pd.DataFrame(ROWS)):
        with pytest.raises(DataError, match="the row is .*not a mapping of column to value"):
            as_row(bad)
    with pytest.raises(DataError, match="the splits 'train'"):
        as_row(datasets.DatasetDict(train=TABLE))


def test_check_rows() -> None:
    check_rows([{"x": 1, "y": 2}], {"x"}, "train_dataset")
    with pytest.raises(DataError, match=r"row 1 has no column 'text'.*did you mean 'texts'.*It has: texts"):
        check_rows([{"text": "a"}, {"texts": "b"}], {"text"}, "train_dataset")


# Everything that takes rows


def test_trainers_take_a_data_frame(one_lm: LanguageModel, tmp_path: Path) -> None:
    frame, target = pd.DataFrame(ROWS), one_lm.log_prob("{z}{y}", given="{x}")
    common: dict[str, Any] = {"target": target, "prompt": "{x}", "support": SUPPORT}
    args = GFNConfig(output_dir=str(tmp_path), max_steps=1, num_samples=2, use_cpu=True)
    assert GFNTrainer(one_lm, **common, train_dataset=frame, args=args).train_dataset == ROWS
    assert EM(one_lm, **common, train_dataset=frame, args=args).rows == ROWS
    for refused in (datasets.DatasetDict(train=TABLE), TABLE.to_iterable_dataset()):
        with pytest.raises(DataError, match="train_dataset"):
            GFNTrainer(one_lm, **common, train_dataset=refused, args=args)
        with pytest.raises(DataError, match="train_dataset"):
            EM(one_lm, **common, train_dataset=refused, args=args)


def test_baselines_take_a_data_frame(one_lm: LanguageModel, tmp_path: Path) -> None:
    policy, frame = Policy(one_lm, "{x}", SUPPORT), pd.DataFrame(ROWS)
    gold = [[" a"], [" cat"]]
    assert examples(policy, frame, gold) == examples(policy, ROWS, gold)
    assert decode(policy, frame, "greedy", 1).rows == ROWS
    target = one_lm.log_prob("{z}{y}", given="{x}")
    config = PPOConfig(max_steps=1, num_samples=2)
    train_ppo(policy, frame, target.score_final, config=config, output_dir=tmp_path)
    with pytest.raises(DataError, match="the splits 'train'"):
        train_ppo(policy, datasets.DatasetDict(train=TABLE), target.score_final, output_dir=tmp_path)


def test_a_posterior_takes_a_series(one_lm: LanguageModel) -> None:
    policy = Policy(one_lm, "{x}", SUPPORT)
    posterior = Posterior(policy, one_lm.log_prob("{z}{y}", given="{x}"))
    series = pd.DataFrame(ROWS).iloc[1]
    plain = posterior.sample(ROWS[1], 3)
    assert posterior.sample(series, 3) == plain
    assert posterior.sample(series, 3, correct="sir") == posterior.sample(ROWS[1], 3, correct="sir")
    texts = [s.tokens for s in plain]
    assert posterior.log_prob(series, texts).tolist() == posterior.log_prob(ROWS[1], texts).tolist()
    assert posterior.estimate(series, 20) == posterior.estimate(ROWS[1], 20)
    of_frame = posterior.diagnose(pd.DataFrame(ROWS), 20).rows
    assert str(of_frame) == str(posterior.diagnose(ROWS, 20).rows), "NaN is not equal to itself"
    assert str([posterior.diagnose(series, 20)]) == str(of_frame[1:])
    for call in (posterior.sample, posterior.estimate, posterior.diagnose):
        with pytest.raises(DataError, match="a column named 0, not text"):
            call({**ROWS[0], 0: "a"})


def test_predictions_take_a_series(one_lm: LanguageModel) -> None:
    posterior = Posterior(Policy(one_lm, "{x}", SUPPORT), one_lm.log_prob("{z}{y}.", given="{x}"))
    series = pd.Series(ROWS[0])
    assert posterior.predict(series, [" a", " cat"], 4) == posterior.predict(ROWS[0], [" a", " cat"], 4)
    assert posterior.vote(series, 4) == posterior.vote(ROWS[0], 4)
    frame = pd.DataFrame(ROWS)
    assert posterior.predict(frame, [" a", " cat"], 4) == posterior.predict(ROWS, [" a", " cat"], 4)
    assert posterior.vote(frame, 4) == posterior.vote(ROWS, 4)


# Files

TEXTS = [{"x": "the dog", "y": "1"}, {"x": "a, cat", "y": ""}]
LONG = "a" * 140_000  # Python's csv stops at 131,072


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("rows.jsonl", '{"x": "a"}\n\n{"x": "b"}\n', [{"x": "a"}, {"x": "b"}]),
        ("rows.jsonl", '{"x": "a\u2028b\x85c"}\r\n{"x": 3}', [{"x": "a\u2028b\x85c"}, {"x": 3}]),
        ("rows.jsonl", "\ufeff{}", [{}]),
        ("rows.json", '[{"x": "a"},\n {"x": null}]', [{"x": "a"}, {"x": None}]),
        ("rows.json", '\ufeff[{"x": "ä"}]', [{"x": "ä"}]),
        ("rows.csv", 'x,y\nthe dog,1\n"a, cat",\n', TEXTS),
        ("rows.csv", '\ufeffx,y\nthe dog,1\n"a, cat",\n', TEXTS),
        ("rows.csv", 'x,y\r\nthe dog,1\r\n"a, cat",\r\n', TEXTS),
        ("rows.csv", 'x,y\n"two\nlines","a ""quote"""\n', [{"x": "two\nlines", "y": 'a "quote"'}]),
        ("rows.csv", "x,y\nonly x\n", [{"x": "only x", "y": None}]),
        ("rows.csv", f'x\n"{LONG}"\n{LONG}\n', [{"x": LONG}, {"x": LONG}]),
        ("rows.tsv", "x\ty\nthe dog\t1\na, cat\t\n", TEXTS),
    ],
)  # fmt: skip
def test_data_files(tmp_path: Path, name: str, text: str, rows: list[dict]) -> None:
    file, limit = tmp_path / name, csv.field_size_limit()
    file.write_bytes(text.encode())
    assert load_rows(file) == rows
    assert csv.field_size_limit() == limit, "a setting of the process"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "is empty: give at least one row"),
        ("rows.jsonl", "\n\n", "is empty"),
        ("rows.json", "", "line 1: not JSON: Expecting value"),
        ("rows.json", "[]", "is empty"),
        ("rows.json", '{"x": ["a", "b"]}', "is one mapping; give a list of rows"),
        ("rows.json", '[{"x": "a"},\n {"x": }]', "line 2: not JSON: Expecting value"),
        ("rows.json", "[1]", "row 0 is 1, not a mapping"),
        ("rows.jsonl", '{"x": "a"}\n\n2\n', "line 3: 2 is not an object of column to value"),
        ("rows.jsonl", '{"x": "a"}\n{"x": \n', "line 2: not JSON: Expecting value"),
        ("rows.jsonl", '{"x": "a"}\n{"x": 1, "x": 2}\n', "line 2: not JSON: an object has 'x' more than once"),
        ("rows.jsonl", "[" * 100_000, "line 1: not JSON: maximum recursion depth"),
        ("rows.jsonl", '{"x": ' + "9" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
        ("rows.csv", "", "is empty"),
        ("rows.csv", "x,y\n", "is empty"),
        ("rows.csv", "x,y\n1,2\n1,2,3\n", "line 3: more values than the header has columns"),
        ("rows.csv", "x,y,x\n1,2,3\n", "line 1: the header has more than one column 'x'"),
        ("rows.csv", 'x,y\n"never closed,2\n3,4\n', "line 2: unexpected end of data; inside a quoted value, write"),
        ("rows.tsv", 'x\n"Hi" he said\n', "line 2: '\t' expected after '\"'; inside a quoted value, write"),
        ("rows.txt", "a\n", "use .jsonl, .json, .csv or .tsv"),
        ("rows.json.gz", "a\n", "use .jsonl, .json, .csv or .tsv; datasets.load_dataset reads other kinds"),
        ("rows.parquet", "a\n", "use .jsonl, .json, .csv or .tsv; datasets.load_dataset reads other kinds"),
        ("rows", "a\n", "use .jsonl, .json, .csv or .tsv"),
    ],
)  # fmt: skip
def test_bad_data_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as e:
        load_rows(file)
    assert message in str(e.value)
    assert str(file) in str(e.value)


def test_data_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read data file .*none\.jsonl: No such file"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot read data file"):
        load_rows(tmp_path / "folder.csv")
    file = tmp_path / "other.csv"
    for encoding in ("latin-1", "utf-16"):
        file.write_bytes("x\nplain\ncafé\n".encode(encoding))
        with pytest.raises(DataError, match=r"is not UTF-8 text \(line \d\): save it as UTF-8, e\.g\. iconv"):
            load_rows(file)
    file.write_bytes("x\nplain\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"\(line 3\)"):
        load_rows(file)


SOURCE = Path(__file__).parents[1] / "src"


def without_encoding(path: Path) -> Iterator[int]:
    """Lines that open a text file in the encoding of the machine, which need not be UTF-8."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        of_path = isinstance(node.func, ast.Attribute)
        name = node.func.attr if of_path else getattr(node.func, "id", "")
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_binary = name == "open" and any("b" in mode for mode in texts if set(mode) <= set("rwaxbt+"))
        given = {keyword.arg for keyword in node.keywords}
        opens = name in ("open", "fdopen") or (of_path and name in ("read_text", "write_text"))
        if opens and not is_binary and "encoding" not in given:
            yield node.lineno


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in SOURCE.rglob("*.py")
        for line in without_encoding(path)
    ]
    assert not found
