"""The playground: its routes, its page, and short trainings that are told, stopped and left."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import LEAST_CONTRAST, browser, needs_chromium, open_page
from fastapi.testclient import TestClient
from reference import tiny_policy
from serving import events, post, running, until

from amortlm import LanguageModel, Posterior, Support, constraint
from amortlm.policy import Policy
from amortlm.report.verdict import judged
from amortlm.serve import Limits, create_app, create_play, training
from amortlm.serve.app import KEY
from amortlm.serve.play import TEXT, UPDATES
from amortlm.serve.setups import LONGEST
from amortlm.types import finite

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROW = {"x": "the dog"}
SMALL = {"kind": "continue", "temperature": 0.5, "shortest": 1, "longest": 2}
BUILDING = ("/play/build", "/play/train", "/play/stop")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def saved(posterior: Posterior) -> Iterator[TestClient]:
    """The playground of a trained posterior."""
    with TestClient(create_play(posterior, name="tiny"), raise_server_exceptions=False) as found:
        yield found


@pytest.fixture
def fresh(one_lm: LanguageModel) -> Iterator[TestClient]:
    """The playground of a model."""
    with TestClient(create_play(one_lm), raise_server_exceptions=False) as found:
        yield found


def ask(client: TestClient, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def service(client: TestClient) -> Any:
    return client.app.state.service  # type: ignore[attr-defined]


# The page


def test_the_page_may_do_nothing_but_talk_to_its_server(saved: TestClient) -> None:
    response = saved.get("/")
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("connect-src") == "'self'"
    for tag in ("style", "script"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        hashed = base64.b64encode(hashlib.sha256(parts[0].encode()).digest()).decode()
        assert (len(parts), rules.pop(f"{tag}-src")) == (1, f"'sha256-{hashed}'")
    others = ("base-uri", "form-action", "frame-ancestors")
    assert rules == {"img-src": "data:"} | dict.fromkeys(others, "'none'")
    assert "http" not in response.text.replace("http-equiv", "")
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        " style=",
        " onclick=",
    ):
        assert sink not in response.text


def test_the_page_is_open_and_its_data_need_the_key(one_lm: LanguageModel) -> None:
    with TestClient(create_play(one_lm, api_key="secret")) as client:
        assert client.get("/").status_code == 200
        assert client.get("/play").status_code == 401
        for path in ("/play/sample", "/play/table", "/play/measure", *BUILDING):
            assert client.post(path, json={}).status_code == 401, path
        assert client.get("/play", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_plain_service_has_no_page(posterior: Posterior) -> None:
    with TestClient(create_app(posterior)) as client:
        assert client.get("/").status_code == client.get("/play").status_code == 404


# Any posterior


def test_what_a_saved_posterior_offers(saved: TestClient) -> None:
    state = saved.get("/play").json()
    assert state.items() >= saved.get("/posterior").json().items()
    assert (state["setup"], state["trained"], state["enumerable"]) == (None, True, False)
    for path in BUILDING:
        ask(saved, path, {}, 404)


def test_three_columns(saved: TestClient, posterior: Posterior) -> None:
    found = ask(saved, "/play/sample", {"columns": ROW, "n": 5, "seed": 3})
    wanted = {
        "prompted": posterior.sample_prior(ROW, 5, seed=3),
        "sampler": posterior.sample(ROW, 5, seed=3),
        "corrected": posterior.sample(ROW, 5, seed=3, correct="sir", budget=256),
    }
    texts = {name: [s["text"] for s in found[name]["samples"]] for name in wanted}
    assert texts == {name: [s.text for s in samples] for name, samples in wanted.items()}
    assert len({tuple(column) for column in texts.values()}) == 3
    for name, samples in wanted.items():
        for figure in ("log_q", "log_reward", "weight"):
            assert [s[figure] for s in found[name]["samples"]] == [getattr(s, figure) for s in samples]
        assert (found[name]["draws"], found[name]["ess"]) == (samples.draws, samples.ess)


def test_samples_without_a_seed_differ_and_name_it(saved: TestClient) -> None:
    first, second = (ask(saved, "/play/sample", {"columns": ROW}) for _ in range(2))
    assert first["sampler"] != second["sampler"]
    assert ask(saved, "/play/sample", {"columns": ROW, "seed": first["seed"]}) == first


def test_a_correction_that_fails_leaves_the_other_columns(one_lm: LanguageModel) -> None:
    support = Support(stop=".", min_tokens=1, max_tokens=2)
    target = (one_lm.log_prob("{z}", given="{x}") + constraint.contains("nowhere")).bind(one_lm)
    with TestClient(create_play(Posterior(tiny_policy(one_lm, "{x}", support), target))) as client:
        found = ask(client, "/play/sample", {"columns": ROW, "n": 2})
    assert found["corrected"]["error"]["code"] == "no_reward"
    assert [s["log_reward"] for s in found["sampler"]["samples"]] == [None, None]
    assert [s["weight"] for s in found["sampler"]["samples"]] == [0, 0]


def test_a_small_support_is_enumerated_and_a_large_one_is_not(fresh: TestClient, saved: TestClient) -> None:
    assert ask(fresh, "/play/build", SMALL)["enumerable"]
    found = ask(fresh, "/play/table", {"columns": ROW})
    table = service(fresh).posterior.table(ROW)
    assert found == {**table.to_dict(), "legend": table.legend}
    assert found["method"] == "enumeration"
    refused = ask(saved, "/play/table", {"columns": ROW}, 400)
    assert "at most 4,096 completions" in refused["error"]["message"]


def test_a_measurement_is_told_in_words(fresh: TestClient) -> None:
    ask(fresh, "/play/build", SMALL)
    found = ask(fresh, "/play/measure", {"columns": ROW, "n": 64, "seed": 1})
    posterior = service(fresh).posterior
    figures = finite(posterior.diagnose(ROW, 64, seed=1, limit=4096).to_dict())
    assert found["figures"] == json.loads(json.dumps(figures))
    verdict = judged([figures])
    assert (found["kind"], found["headline"]) == (verdict.kind, verdict.headline)
    assert "percent" in verdict.detail or "%" in verdict.detail


@pytest.mark.parametrize("path", ["/play/sample", "/play/table", "/play/measure", "/play/train"])
def test_rows_are_texts_of_bounded_length(fresh: TestClient, path: str) -> None:
    for value in ("a" * (TEXT + 1), 3, ["a"], {"role": "user"}):
        assert ask(fresh, path, {"columns": {"x": value}}, 400)["error"]["param"] == "x"
    assert ask(fresh, path, {"columns": {}}, 400)["error"]["param"] == "columns"
    assert "unknown parameter" in ask(fresh, path, {"columns": ROW, "code": ""}, 400)["error"]["message"]


def test_counts_are_bounded(one_lm: LanguageModel) -> None:
    with TestClient(create_play(one_lm, limits=Limits(n=4, draws=20))) as client:
        assert ask(client, "/play/sample", {"columns": ROW, "n": 5}, 400)["error"]["param"] == "n"
        assert ask(client, "/play/measure", {"columns": ROW, "n": 21}, 400)["error"]["param"] == "n"
        assert ask(client, "/play/sample", {"columns": ROW, "n": 4})["corrected"]["draws"] == 20
        assert ask(client, "/play/train", {"columns": ROW, "updates": UPDATES + 1}, 400)


# Kinds of posteriors


def test_each_kind_is_the_posterior_that_it_says(fresh: TestClient, one_lm: LanguageModel) -> None:
    lm, lengths = one_lm, {"shortest": 2, "longest": 4}
    wanted = {
        "continue": ("{x}", lm.log_prob("{z}", given="{x}") / 0.5),
        "fill": ("{y}</s><s>{x}", lm.log_prob("{z} {y}", given="{x}")),
        "contain": ("{x}", lm.log_prob("{z}", given="{x}") + constraint.contains("dog", "cat")),
    }
    for kind, (prompt, target) in wanted.items():
        state = ask(fresh, "/play/build", {"kind": kind, "temperature": 0.5, "words": "dog, cat", **lengths})
        assert (state["prompt"], state["target"]) == (prompt, target.to_spec())
        support = Support(stop=".", min_tokens=2, max_tokens=4)
        assert state["support"] == json.loads(json.dumps(support.to_dict()))
        assert (state["setup"]["kind"], state["trained"]) == (kind, False)
        row = dict.fromkeys(state["columns"], "the dog")
        found = ask(fresh, "/play/sample", {"columns": row, "n": 3, "seed": 0})
        assert found["prompted"] == found["sampler"]  # nothing is trained yet
        plain = Posterior(Policy(lm, prompt, support), target.bind(lm))
        assert [s["text"] for s in found["sampler"]["samples"]] == [s.text for s in plain.sample(row, 3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "eval"},
        {"prompt": "{x}"},
        {"temperature": 0},
        {"temperature": "1"},
        {"longest": LONGEST + 1},
        {"shortest": 5, "longest": 4},
        {"kind": "contain", "words": " , "},
        {"kind": "contain", "words": "a b c d e"},
        {"words": "a" * 121},
    ],
)
def test_other_kinds_are_refused(fresh: TestClient, wrong: dict[str, Any]) -> None:
    before = fresh.get("/play").json()
    ask(fresh, "/play/build", wrong, 400)
    assert fresh.get("/play").json() == before


def test_words_are_texts_and_nothing_else(fresh: TestClient) -> None:
    state = ask(fresh, "/play/build", {"kind": "contain", "words": "{y} .* __import__('os')"})
    assert state["target"][-1] == {"weight": 1.0, "contains": ["{y}", ".*", "__import__('os')"]}
    assert state["columns"] == ["x"]


# Training


def lines(response: Any) -> list[Any]:
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line]


def test_a_training_is_told_and_its_sampler_is_used(fresh: TestClient) -> None:
    ask(fresh, "/play/build", SMALL)
    response = fresh.post("/play/train", json={"columns": ROW, "updates": 7, "seed": 1})
    assert response.headers["content-type"].startswith("text/event-stream")
    *steps, last = lines(response)
    assert [event["step"] for event in steps] == list(range(8))
    assert [event["step"] for event in steps if "samples" in event] == [0, 5, 7]
    assert all(0 < event["ess"] <= 1 and len(event["samples"]) == 4 for event in steps if "ess" in event)
    assert (last["done"], last["stopped"]) == (True, False)
    assert last["state"] == fresh.get("/play").json()
    assert (last["state"]["trained"], last["state"]["training"]) == (True, False)
    found = ask(fresh, "/play/sample", {"columns": ROW, "n": 8, "seed": 1})
    log_q = [[s["log_q"] for s in found[column]["samples"]] for column in ("prompted", "sampler")]
    assert log_q[0] != log_q[1]
    after = service(fresh).posterior.table(ROW)
    ask(fresh, "/play/build", SMALL)
    before = service(fresh).posterior.table(ROW)
    assert [x.p for x in after.lines] == [x.p for x in before.lines]
    assert [x.q for x in after.lines] != [x.q for x in before.lines]


def test_a_training_that_fails_says_why_and_changes_nothing(fresh: TestClient) -> None:
    (event,) = lines(fresh.post("/play/train", json={"columns": {"x": "a " * 60}}))
    assert "context" in event["error"]["message"]
    state = fresh.get("/play").json()
    assert (state["trained"], state["training"]) == (False, False)


class Held:
    """Holds a training at its first look until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.opened = threading.Event(), threading.Event()
        real = training.Look.at

        def at(*args: Any) -> Any:
            self.begun.set()
            assert self.opened.wait(60)
            return real(*args)

        monkeypatch.setattr(training.Look, "at", at)


def start_training(port: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"columns": ROW, "updates": 50})
    connection.request("POST", "/play/train", body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_one_training_at_a_time_and_it_can_be_stopped(
    one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, held = create_play(one_lm), Held(monkeypatch)
    with running(app) as port:
        connection, response = start_training(port)
        assert held.begun.wait(60)
        for path, body in (("train", {"columns": ROW}), ("build", SMALL)):
            status, answer = post(port, f"/play/{path}", body)
            assert (status, answer["error"]["code"]) == (409, "training")
        assert post(port, "/play/stop", {}) == (200, {"training": True})
        held.opened.set()
        *steps, last = events(response)
        connection.close()
        assert [event["step"] for event in steps] == [0, 1]
        assert (last["done"], last["stopped"], last["state"]["trained"]) == (True, True, True)
        assert post(port, "/play/stop", {}) == (200, {"training": False})
        assert post(port, "/play/build", SMALL)[0] == 200


def test_who_leaves_ends_the_training(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    app, held, works = create_play(one_lm), Held(monkeypatch), list[Any]()
    found: Any = app.state.service
    real = found.worker.submit
    monkeypatch.setattr(found.worker, "submit", lambda work: (works.append(work), real(work)))
    with running(app) as port:
        connection, response = start_training(port)
        assert held.begun.wait(60)
        response.close()
        connection.close()
        until(lambda: works[0].gone)
        held.opened.set()
        assert works[0].future.result(60)["stopped"]


# In a browser

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
HOSTILE = "the dog <img src=x onerror=document.title='hit'>"


def wait(page: Page) -> None:
    """Until the page has done what it was asked. (The page's policy forbids `wait_for_function`, which is an eval.)"""
    page.wait_for_selector("#sample:enabled")


@needs_chromium
@pytest.mark.slow
def test_the_page_in_a_browser(
    one_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(create_play(one_lm, name="tiny")) as port, browser() as chromium:
        address = f"http://127.0.0.1:{port}/"
        for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")):
            page, complaints = open_page(chromium, address, width, scheme)
            wait(page)
            page.select_option("#kind", "continue")
            page.fill("#shortest", "1")
            page.fill("#longest", "2")
            page.click("text=Use this posterior")
            page.wait_for_selector("#unsaved", state="hidden")
            wait(page)
            page.fill("textarea[name=x]", "the dog")
            page.click("#sample")
            page.wait_for_selector("#samples .corrected")
            assert page.locator("#samples > div").count() == 3
            assert page.locator("#samples .completion").count() == 3 * 8
            assert page.locator("#samples .bar").count() == 3 * 8
            page.click("#enumerate")
            page.wait_for_selector("#table table")
            assert page.locator("#table tbody tr").count() == 21
            page.click("#measure")
            page.wait_for_selector("#verdict strong")
            assert "nats, exactly, by enumeration" in page.locator("#verdict .hint").inner_text()
            wait(page)
            assert complaints == []
            assert page.evaluate(LEAST_CONTRAST) > 4.5
            assert page.evaluate(WIDER) == 0, "nothing to scroll to the side"
            page.screenshot(path=tmp_path / f"play-{width}-{scheme}.png", full_page=True)
            page.close()


@needs_chromium
@pytest.mark.slow
def test_hostile_text_stays_text_in_a_browser(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a field, in the target, in an error and in completions."""
    monkeypatch.setattr(Posterior, "texts", lambda self, rollouts: [HOSTILE] * len(rollouts))
    with running(create_play(one_lm)) as port, browser() as chromium:
        page, complaints = open_page(chromium, f"http://127.0.0.1:{port}/")
        wait(page)
        page.select_option("#kind", "contain")
        page.fill("#words", "<img/src=x/onerror=document.title='hit'>")
        page.click("text=Use this posterior")
        page.wait_for_selector("#target:has-text('<img/src=x')")
        page.select_option("#kind", "continue")
        page.click("text=Use this posterior")
        page.wait_for_selector("#unsaved", state="hidden")
        page.fill("textarea[name=x]", HOSTILE)
        page.click("#sample")
        page.wait_for_selector("#samples .completion, #problem:not([hidden])")
        page.fill("textarea[name=x]", "the dog")
        page.click("#sample")
        page.wait_for_selector("#samples .completion")
        assert page.locator("#samples .text").first.text_content() == HOSTILE
        assert page.locator("img").count() == 0
        assert page.title() == "Playground – amortlm"
        assert {c for c in complaints if "400" not in c} == set()  # the browser tells of the long prompt
        with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            page.evaluate(f"document.body.innerHTML = {json.dumps(HOSTILE)}")  # if it did not stay text
        assert page.title() == "Playground – amortlm"


def hold_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings wait there to be stopped: a fast machine would replace figures before the browser looks at them."""
    on_step_end = training._Progress.on_step_end

    def held(self: training._Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step + 1:
            until(lambda: self.training.stop)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Progress, "on_step_end", held)


@needs_chromium
@pytest.mark.slow
def test_a_training_in_a_browser(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_at(5, monkeypatch)
    app = create_play(one_lm, api_key="secret")
    with running(app) as port, browser() as chromium:
        page, complaints = open_page(chromium, f"http://127.0.0.1:{port}/")
        page.fill("#key", "wrong")
        page.click("text=Open")
        page.wait_for_selector("#problem")
        page.fill("#key", "secret")
        page.click("text=Open")
        page.wait_for_selector("#play")
        assert complaints
        assert all("401" in complaint for complaint in complaints)
        complaints.clear()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.fill("textarea[name=x]", "the dog")
        page.fill("#updates", "100")
        page.click("#train")
        page.wait_for_selector("#figures:has-text('Update 5 of 100')")
        assert page.locator("#fresh .completion").count() == 4
        assert page.locator("#sample").is_disabled()
        page.click("#stop")
        page.wait_for_selector("#figures:has-text('Stopped')")
        wait(page)
        assert "The sampler is trained." in (page.text_content("#model") or "")
        assert page.evaluate("document.getElementById('progress').value") < 100
        page.fill("#updates", "3")
        page.click("#train")
        page.wait_for_selector("#figures:has-text('Done')")
        assert complaints == []
