"""`amortlm serve`: what it refuses before it loads anything, and a server in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fake_vllm
import pytest
from fastapi.testclient import TestClient
from reference import tiny_policy

from amortlm import LanguageModel, Posterior, Support
from amortlm.cli import main
from amortlm.cli.options import make_parser
from amortlm.errors import MissingExtraError
from amortlm.rollout import HTTPSampler
from amortlm.serve import Limits, create_app
from amortlm.serve.app import KEY

MAIN = "import sys; from amortlm.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """What looks like a saved posterior until it is loaded."""
    (tmp_path / "posterior.json").write_text('{"format": 1}')
    return str(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_others_are_not_let_in_without_a_key(
    host: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, "--host", host]) == 2
    err = capsys.readouterr().err
    assert KEY in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "give another --host or --port"),
        (["--max-n", "0"], "'n'"),
        (["--timeout", "0"], "'seconds'"),
        (["--port", "0"], "posterior.json is missing"),  # with a key, or on this machine, its content is next
    ],
)
def test_refused_in_one_line(
    arguments: list[str], says: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_named(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", folder, "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_the_defaults_are_those_of_the_library() -> None:
    args = make_parser().parse_args(["serve", "folder"])
    assert args.host == "127.0.0.1"
    assert Limits(args.max_n, args.max_draws, args.max_body, args.max_queue, args.timeout) == Limits()


def test_the_playground_has_the_same_limits_and_needs_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    parse = make_parser().parse_args
    assert parse(["play"]).folder is None
    serve, play = (vars(parse([command, "folder"])) for command in ("serve", "play"))
    assert {**play, "command": "serve", "rollout": []} == serve
    assert main(["play", "--host", "0.0.0.0"]) == 2
    assert KEY in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("fastapi", "uvicorn"):
        with monkeypatch.context() as patch:
            for name in [
                n for n in sys.modules if n.split(".")[0] == missing or n.startswith("amortlm.serve")
            ]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
            with pytest.raises(MissingExtraError, match=r"pip install 'amortlm\[serve\]'"):
                __import__("amortlm.serve")


def started(*command: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != KEY}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *command], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_a_server_in_a_process(embedded: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    support = Support(stop=".", max_tokens=5)
    posterior = Posterior(tiny_policy(embedded, "{x}", support), embedded.log_prob("{z}", given="{x}"))
    posterior.save_pretrained(folder)
    server = started("serve", str(folder), "--port", "0")
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("serving"))
        found = re.fullmatch(r"serving mine at http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)
        assert found
        port = int(found[1])

        def ask(host: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = json.dumps({"model": "mine", "prompt": "One day", "seed": 3})
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json", "Host": host}
            )
            response = connection.getresponse()
            return response.status, response.read()

        status, answer = ask(f"localhost:{port}")
        assert status == 200
        assert json.loads(answer)["choices"][0]["text"] == posterior.sample({"x": "One day"}, seed=3)[0].text
        assert ask("evil.example")[0] == 400  # a page that has given itself the address of this machine
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(60) == 128 + signal.SIGTERM
        assert "ended by SIGTERM" in rest
        assert "Traceback" not in rest
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_signal_ends_a_training_of_the_playground(embedded: LanguageModel) -> None:
    server = started("play", "--port", "0")
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("serving"))
        found = re.match(r"serving embedded at http://127\.0\.0\.1:(\d+) ", line)
        assert found
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=120)
        body = json.dumps({"columns": {"x": "One day"}, "updates": 100})
        connection.request("POST", "/play/train", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert json.loads(response.readline()[6:])["step"] == 0
        server.send_signal(signal.SIGTERM)
        *steps, last = [json.loads(line[6:]) for line in response if line.strip()]
        assert len(steps) < 20
        assert (last["done"], last["stopped"]) == (True, True)
        rest = server.stderr.read()
        assert server.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in rest
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_completions_are_drawn_by_a_server(one_lm: LanguageModel, tmp_path: Path) -> None:
    """As the local engine draws them, also in a stream; both servers are real ones."""
    support = Support(stop=".", min_tokens=1, max_tokens=4)
    policy, theirs = (tiny_policy(one_lm, "{x}", support) for _ in range(2))
    posterior = Posterior(policy, one_lm.log_prob("{z}", given="{x}"))
    asked = {"prompt": "a b", "n": 5, "seed": 3}
    scored = asked | {"logprobs": 0}
    with TestClient(create_app(posterior, name="tiny")) as client:
        here = client.post("/v1/completions", json=scored).json()["choices"]
    with fake_vllm.serving(theirs, tmp_path / "server") as (url, engine):
        policy.sampler = HTTPSampler(url, policy)
        before = engine.finished
        with TestClient(create_app(posterior, name="tiny")) as client:
            there = client.post("/v1/completions", json=scored).json()["choices"]
            with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
                lines = [line.removeprefix("data: ") for line in answer.iter_lines() if "choices" in line]
        assert engine.finished == before + 10
    texts = [choice["text"] for choice in here]
    assert [choice["text"] for choice in there] == texts
    for mine, other in zip(here, there, strict=True):
        assert other["log_q"] == pytest.approx(mine["log_q"], abs=1e-4)
        assert other["logprobs"]["token_logprobs"] == pytest.approx(
            mine["logprobs"]["token_logprobs"], abs=1e-4
        )
    streamed = [""] * 5
    for line in lines:
        for choice in json.loads(line)["choices"]:
            streamed[choice["index"]] += choice.get("text", "")
    assert streamed == texts
