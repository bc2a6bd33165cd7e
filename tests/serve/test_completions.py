"""Answers are those of the posterior in Python; what it does not offer is refused in OpenAI's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from reference import tiny_policy
from serving import joined

from amortlm import LanguageModel, Posterior, Support, constraint, verifier
from amortlm.diagnostics.certificate import Certificate
from amortlm.serve import create_app
from amortlm.serve.refusals import without_paths
from amortlm.types import finite

ROW = {"x": "the dog"}
PATH = "/v1/completions"


def served(posterior: Posterior, **settings: Any) -> TestClient:
    return TestClient(create_app(posterior, **settings), raise_server_exceptions=False)


def error(response: Any) -> dict[str, Any]:
    (found,) = response.json().values()
    assert set(found) == {"message", "type", "param", "code"}
    return dict(found)


@pytest.mark.parametrize("settings", [{}, *({"correct": m, "budget": 40} for m in ("sir", "smc", "mh"))])
def test_the_answer_is_that_of_sample(
    posterior: Posterior, client: TestClient, settings: dict[str, Any]
) -> None:
    answer = client.post(
        PATH, json={"model": "tiny", "prompt": "the dog", "n": 5, "seed": 7, **settings}
    ).json()
    samples = posterior.sample(ROW, 5, seed=7, **settings)
    for i, (choice, sample) in enumerate(zip(answer["choices"], samples, strict=True)):
        ending = "length" if len(sample.tokens) == 8 else "stop"
        assert choice == {
            "index": i, "text": sample.text, "finish_reason": ending, "logprobs": None,
            "log_q": sample.log_q, "log_reward": sample.log_reward, "weight": sample.weight,
        }  # fmt: skip
    assert answer["amortlm"] == {"seed": 7, **samples.summary()}
    prompt = len(posterior.policy.encode_rows([ROW])[0])
    written = sum(len(s.tokens) + 1 for s in samples)
    assert answer["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
    }  # fmt: skip
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_both_reasons_to_finish_occur(client: TestClient) -> None:
    choices = client.post(PATH, json={"prompt": "the dog", "n": 100, "seed": 0}).json()["choices"]
    assert {c["finish_reason"] for c in choices} == {"stop", "length"}


def test_more_than_one_batch_is_still_that_of_sample(posterior: Posterior) -> None:
    from amortlm.serve import Limits

    with served(posterior, limits=Limits(n=600)) as client:
        choices = client.post(PATH, json={"prompt": "the dog", "n": 600, "seed": 1}).json()["choices"]
    assert [c["text"] for c in choices] == [s.text for s in posterior.sample(ROW, 600, seed=1)]


def test_without_a_seed_one_is_drawn_and_told(client: TestClient) -> None:
    first, second = (client.post(PATH, json={"prompt": "the dog", "n": 8}).json() for _ in range(2))
    assert first["amortlm"]["seed"] != second["amortlm"]["seed"]
    again = client.post(PATH, json={"prompt": "the dog", "n": 8, "seed": first["amortlm"]["seed"]}).json()
    assert again["choices"] == first["choices"] != second["choices"]


def test_logprobs_are_those_of_the_tokens(posterior: Posterior, client: TestClient) -> None:
    asked = {"prompt": "the dog", "n": 6, "seed": 2, "logprobs": 0}
    samples = posterior.sample(ROW, 6, seed=2)
    for choice, sample in zip(client.post(PATH, json=asked).json()["choices"], samples, strict=True):
        found, text = choice["logprobs"], choice["text"]
        assert "".join(found["tokens"]) == text
        assert found["top_logprobs"] is None
        places = zip(found["text_offset"], found["tokens"], strict=True)
        assert all(text[at:].startswith(piece) for at, piece in places)
        rollouts = posterior.policy.rollouts([ROW], [[sample.tokens]])
        length = int(rollouts.lengths[0])
        exact = posterior.policy.evaluate(rollouts)
        wanted = [*exact.log_pf[0, :length].tolist(), exact.log_pterm[0, length].item()]
        assert found["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
        assert sum(found["token_logprobs"]) == pytest.approx(choice["log_q"], abs=1e-4)


def test_a_stream_joins_to_the_answer(client: TestClient) -> None:
    asked = {"prompt": "the dog", "n": 4, "seed": 5}
    whole = client.post(PATH, json=asked).json()
    with client.stream("POST", PATH, json={**asked, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    found = [json.loads(line) for line in lines[:-1]]
    assert joined(found) == [c["text"] for c in whole["choices"]]
    assert found[-1]["amortlm"] == whole["amortlm"]
    figures = ("log_q", "log_reward", "weight", "finish_reason")
    assert [[c[f] for f in figures] for c in found[-1]["choices"]] == [
        [c[f] for f in figures] for c in whole["choices"]
    ]
    assert all(c["finish_reason"] is None for event in found[:-1] for c in event["choices"])


def test_the_usage_of_a_stream_comes_if_asked_for(client: TestClient) -> None:
    asked = {"prompt": "the dog", "seed": 5}
    whole = client.post(PATH, json=asked).json()
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    text = client.post(PATH, json=body).text
    *_, usage, done = [line[6:] for line in text.splitlines() if line]
    assert done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"max_tokens": 8}, "max_tokens", "at most 9 tokens"),
        ({"max_tokens": "9"}, "max_tokens", "at most 9 tokens"),
        ({"stop": "a"}, "stop", "support"),
        ({"stop": ["a"]}, "stop", "support"),
        ({"temperature": 0}, "temperature", "distribution"),
        ({"top_p": 0.9}, "top_p", "distribution"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "distribution"),
        ({"presence_penalty": 1}, "presence_penalty", "distribution"),
        ({"frequency_penalty": -1}, "frequency_penalty", "distribution"),
        ({"echo": True}, "echo", "completions only"),
        ({"suffix": "s"}, "suffix", "columns"),
        ({"best_of": 3}, "best_of", "weights"),
        ({"logprobs": 1}, "logprobs", "logprobs: 0"),
        ({"logprobs": 0, "stream": True}, "logprobs", "stream"),
        ({"logprobs": 0, "correct": "sir"}, "logprobs", "correct"),
        ({"correct": "sir", "stream": True}, "stream", "streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"n": 0}, "n", "greater"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"n": 129}, "n", "at most 128"),
        ({"seed": "s"}, "seed", "integer"),
        ({"seed": 2**64}, "seed", "less"),
        ({"budget": 10**6, "correct": "sir"}, "budget", "at most 4,096"),
        ({"budget": 40}, None, "corrected"),
        ({"correct": "best"}, None, "unknown correction"),
        ({"correct": "sir", "budget": 2, "n": 3}, None, "too small"),
        ({"top_k": 3}, None, "did you mean 'top_p'"),
        ({"\ud800": 3}, None, "unknown parameter"),
        ({"prompt": ["a", "b"]}, "prompt", "one text"),
        ({"prompt": [1, 2]}, "prompt", "one text"),
        ({"prompt": None}, "columns", "missing: x"),
        ({"prompt": "a \ud800"}, None, "surrogate"),
        ({"prompt": "the dog " * 40}, None, "context of 64"),
        ({"columns": {"x": "a"}}, "prompt", "give columns"),
        ({"columns": {"y": "a"}, "prompt": None}, "columns", "missing: x"),
        ({"columns": {"x": ["a"]}, "prompt": None}, None, "holds a list"),
    ],
)
def test_refused_with_a_reason(
    client: TestClient, body: dict[str, Any], param: str | None, says: str
) -> None:
    data = json.dumps({"prompt": "the dog", **body})
    response = client.post(PATH, content=data, headers={"Content-Type": "application/json"})
    found = error(response)
    assert (response.status_code, found["type"], found["param"]) == (400, "invalid_request_error", param)
    assert says in found["message"]


def test_neutral_values_change_nothing(client: TestClient) -> None:
    asked = {"prompt": "the dog", "n": 3, "seed": 4}
    neutral = {
        "max_tokens": 9, "stop": None, "temperature": 1, "top_p": 1.0, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "echo": False, "suffix": "", "best_of": 3, "user": "me", "stream": False,
        "logprobs": None, "correct": "none", "budget": None,
    }  # fmt: skip
    found = client.post(PATH, json={**asked, **neutral}).json()["choices"]
    assert found == client.post(PATH, json=asked).json()["choices"]


def test_another_model_is_not_found(client: TestClient) -> None:
    response = client.post(PATH, json={"model": "gpt-4", "prompt": "a"})
    assert (response.status_code, error(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"nonsense", b'{"n": NaN}', b'{"n": 1, "n": 2}', b"\xff", b"[" * 10**5]
)
def test_what_is_no_json_object_is_refused(client: TestClient, data: bytes) -> None:
    response = client.post(PATH, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error(response)["message"].startswith("the body")


class TestColumns:
    def test_several_columns_are_given_by_name(self, infilling: Posterior) -> None:
        row = {"x": "a", "y": " cat"}
        with served(infilling) as client:
            for prompt in ({}, {"prompt": ""}):
                found = client.post(PATH, json={"columns": row, "seed": 1, "n": 3, **prompt}).json()[
                    "choices"
                ]
                assert [c["text"] for c in found] == [s.text for s in infilling.sample(row, 3, seed=1)]

    def test_the_error_names_them(self, infilling: Posterior) -> None:
        with served(infilling) as client:
            prompt = error(client.post(PATH, json={"prompt": "a"}))
            some = error(client.post(PATH, json={"columns": {"x": "a"}}))
        assert prompt["message"].startswith("this posterior has the columns x, y: give columns")
        assert some["message"] == "columns must hold a value for each of x, y; missing: y"

    def test_a_posterior_without_columns_needs_none(self, one_lm: LanguageModel) -> None:
        posterior = Posterior(tiny_policy(one_lm, "a", Support(stop=".", max_tokens=3)), None)
        with served(posterior) as client:
            for body in ({}, {"prompt": ""}, {"columns": {}}):
                (choice,) = client.post(PATH, json={"seed": 1, **body}).json()["choices"]
                assert choice["text"] == posterior.sample({}, seed=1)[0].text
            assert "leave prompt out" in error(client.post(PATH, json={"prompt": "b"}))["message"]


class TestTargets:
    def test_without_one_there_are_no_weights(self, posterior: Posterior) -> None:
        with served(Posterior(posterior.policy, None)) as client:
            (choice,) = client.post(PATH, json={"prompt": "a"}).json()["choices"]
            assert choice["log_q"] < 0
            assert choice["log_reward"] is choice["weight"] is None
            response = client.post(PATH, json={"prompt": "a", "correct": "sir"})
            assert response.status_code == 400
            assert "no target" in error(response)["message"]
            assert client.get("/posterior").json()["target"] is None

    def test_no_reward_is_null_with_weight_zero(self, one_lm: LanguageModel, posterior: Posterior) -> None:
        target = one_lm.log_prob("{z}", given="{x}") + constraint.contains("qqqqqqq")
        with served(Posterior(posterior.policy, target)) as client:
            (choice,) = client.post(PATH, json={"prompt": "a"}).json()["choices"]
            assert (choice["log_reward"], choice["weight"]) == (None, 0.0)
            response = client.post(PATH, json={"prompt": "a", "correct": "sir"})
            assert (response.status_code, error(response)["code"]) == (422, "no_reward")

    def test_an_error_of_another_kind_tells_nothing(
        self, posterior: Posterior, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("/secret/place is broken")

        with served(posterior) as client:
            for name, path in (("sample_each", PATH), ("estimate", "/posterior/estimate")):
                monkeypatch.setattr(posterior, name, broken)
                response = client.post(path, json={"prompt": "a"})
                assert response.status_code == 500
                assert "secret" not in response.text
        logged = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
        assert logged == ["/secret/place is broken"] * 2

    def test_no_path_of_the_server_is_told(self, one_lm: LanguageModel) -> None:
        lm = LanguageModel(one_lm.model, one_lm.tokenizer, name="/usr/lib")
        target = lm.log_prob("{z}") + verifier(lambda texts, rows: [1 / 0])
        posterior = Posterior(tiny_policy(lm, "{x}", Support(stop=".", max_tokens=3)), target)
        with served(posterior) as client:
            assert client.get("/posterior").json()["model"] == "lib"
            long = client.post(PATH, json={"prompt": "the dog " * 40})
            failed = client.post(PATH, json={"prompt": "a"})
        assert "[path] has a context of 64" in error(long)["message"]
        assert failed.status_code == 422
        for text in (long.text, failed.text):
            assert "/usr" not in text
            assert ".py" not in text
            assert "Traceback" not in text


class TestFigures:
    def test_estimate(self, posterior: Posterior, client: TestClient) -> None:
        found = client.post("/posterior/estimate", json={"prompt": "the dog", "n": 50, "seed": 3})
        assert found.json() == finite(posterior.estimate(ROW, 50, seed=3).to_dict())

    def test_the_defaults_are_those_of_python(self, posterior: Posterior, client: TestClient) -> None:
        found = client.post("/posterior/estimate", json={"columns": ROW}).json()
        assert found == finite(posterior.estimate(ROW).to_dict())

    def test_diagnose(self, one_lm: LanguageModel, posterior: Posterior) -> None:
        support = Support(stop=".", max_tokens=2, allowed_tokens=(" a", " cat", "s"))
        small = Posterior(tiny_policy(one_lm, "{x}", support), one_lm.log_prob("{z}", given="{x}"))
        with served(small) as client:
            found = client.post(
                "/posterior/diagnose", json={"prompt": "the dog", "n": 50, "level": 0.9}
            ).json()
        assert found == finite(small.diagnose(ROW, 50, level=0.9).to_dict())
        assert "total_variation" in found

    @pytest.mark.parametrize("body", [{"n": 5000}, {"level": 2.0}, {"prompt": None}, {"x": 1}])
    def test_refused(self, client: TestClient, body: dict[str, Any]) -> None:
        assert client.post("/posterior/diagnose", json={"prompt": "a", **body}).status_code == 400


def test_what_is_served_is_described(posterior: Posterior) -> None:
    known = Certificate(
        mark=0.05, reached=0.01, level=0.99, step=3, n=256, seed=0, rows=[{"x": "secret"}], gold=[[]],
        reports=[{}], prompt="{x}", support={}, target=None, data_hash="", adapter_hash="", versions={"torch": "2"},
    )  # fmt: skip
    with served(posterior, name="tiny", certificate=known) as client:
        found, models = client.get("/posterior").json(), client.get("/v1/models").json()
    assert found["certificate"]["mark"] == 0.05
    assert found["certificate"]["rows"] == 1
    assert "secret" not in str(found)
    assert (found["prompt"], found["columns"]) == ("{x}", ["x"])
    assert found["support"] == posterior.policy.support_spec.to_dict()
    assert posterior.target is not None
    assert found["target"] == posterior.target.to_spec()
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_routes_can_be_added(posterior: Posterior) -> None:
    app = create_app(posterior)
    app.add_api_route("/more", lambda: {"more": True})
    with TestClient(app) as client:
        assert client.get("/more").json() == {"more": True}
        unknown, wrong = client.post("/v1/chat/completions", json={}), client.get("/v1/completions")
        assert (unknown.status_code, error(unknown)["code"]) == (404, "unknown_route")
        assert error(unknown)["message"] == (
            "this server has no such route; there are: GET /health, GET /more, GET /posterior, GET /v1/models, "
            "POST /posterior/diagnose, POST /posterior/estimate, POST /v1/completions"
        )
        assert (error(unknown)["type"], error(unknown)["param"]) == ("invalid_request_error", None)
        assert (wrong.status_code, error(wrong)["code"]) == (405, "wrong_method")
        assert error(wrong)["message"].startswith("this route does not take GET; there are: GET /health, ")
        assert wrong.headers["allow"] == "POST"


def test_a_saved_posterior_runs_no_code(tmp_path: Path, embedded: LanguageModel) -> None:
    """`Posterior.from_pretrained`, by which the command loads, has its own tests (tests/security)."""
    from amortlm.cli import main

    support = Support(stop=".", max_tokens=3)
    torch.manual_seed(0)
    Posterior(tiny_policy(embedded, "{x}", support), None).save_pretrained(tmp_path)
    spec = (tmp_path / "posterior.json").read_text()
    hostile = '"target": [{"predicate": "hostile_module:f"}]'
    (tmp_path / "posterior.json").write_text(spec.replace('"target": null', hostile))
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('run')")
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file /srv/models/a.py here", "no file [path] here"),
        ("'~/models/x': bad", "'[path]': bad"),
        ("(C:\\\\data\\\\x)", "([path])"),
        (
            "and/or, </s><s>{x}, 1/2, http://host/a/b, user/name",
            "and/or, </s><s>{x}, 1/2, http://host/a/b, user/name",
        ),
    ],
)
def test_paths_are_taken_out_of_messages(text: str, told: str) -> None:
    assert without_paths(text) == told
