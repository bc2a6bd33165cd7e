"""Judges (the served one against a local server), calibration error and paired tests."""

from __future__ import annotations

import itertools
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from reference import plain_ids, sequence_log_prob

from amortlm.errors import ConfigError, DataError, RewardError
from amortlm.lab.metrics.calibration import calibration
from amortlm.lab.metrics.judge import lm_judge, preferences, served_judge
from amortlm.lab.metrics.paired import paired_test
from amortlm.language_model import LanguageModel

CONTEXTS, A, B = ["x", "y"], ["aa", "b"], ["a", "bbb"]


def longer(context: str, a: str, b: str) -> float:
    return 1.0 if len(a) > len(b) else 0.0


def test_a_judge_is_asked_in_both_orders() -> None:
    assert preferences(CONTEXTS, A, B, longer) == [1.0, 0.0]
    # A judge that always takes the first place prefers neither.
    assert preferences(CONTEXTS, A, B, lambda c, a, b: 1.0) == [0.5, 0.5]
    assert preferences(["x"], ["a"], ["b"], lambda c, a, b: 0.9 if a == "a" else 0.3) == [pytest.approx(0.8)]


def test_bad_judgements_are_refused() -> None:
    with pytest.raises(RewardError, match=r"\[0, 1\]"):
        preferences(CONTEXTS, A, B, lambda c, a, b: 1.5)
    with pytest.raises(DataError):
        preferences(CONTEXTS, A, B[:1], longer)


def test_lm_judge_compares_log_prob_per_token(one_lm: LanguageModel) -> None:
    judge = lm_judge(one_lm, "so, {context}")
    start = [0, *plain_ids(one_lm, "so, the dog")]
    means = []
    for text in (" ran.", " cat, the cat ran."):
        tokens = plain_ids(one_lm, text)
        means.append(sequence_log_prob(one_lm.model, [*start, *tokens], len(start)) / len(tokens))
    expected = 1 / (1 + math.exp(means[1] - means[0]))
    assert judge("the dog", " ran.", " cat, the cat ran.") == pytest.approx(expected, abs=1e-5)
    assert judge("the dog", " cat, the cat ran.", " ran.") == pytest.approx(1 - expected, abs=1e-5)
    with pytest.raises(ConfigError, match="context"):
        lm_judge(one_lm, "{x}")
    with pytest.raises(DataError, match="empty"):
        judge("the dog", "", " ran.")


@pytest.fixture
def server():
    """A chat endpoint that prefers the longer candidate, or says what `server.answer` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((dict(self.headers), body))
            lines = body["messages"][0]["content"].splitlines()
            a, b = (next(x[3:] for x in lines if x.startswith(f"{name}: ")) for name in "AB")
            answer = self.server.answer or ("A." if len(a) > len(b) else "**B**")
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
            self.send_response(self.server.status)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answer, server.status = [], None, 200
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1/chat/completions"


def test_served_judge_asks_the_endpoint(server: HTTPServer) -> None:
    judge = served_judge(address(server), "some-model", headers={"Authorization": "Bearer token"})
    assert preferences(["{a} and {b}"], ["a long {context}"], ["short"], judge) == [1.0]
    assert len(server.requests) == 2
    headers, body = server.requests[0]
    assert headers["Authorization"] == "Bearer token"
    assert body["model"] == "some-model"
    assert body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert "Text:\n{a} and {b}\n" in text  # braces in data are no placeholders
    assert "A: a long {context}\nB: short" in text


@pytest.mark.parametrize("answer", ["Both are good", "A or B", "C", " ", "Absolutely"])
def test_served_judge_refuses_other_answers(server: HTTPServer, answer: str) -> None:
    server.answer = answer
    with pytest.raises(RewardError, match="instead of A or B"):
        served_judge(address(server), "m")("x", "a", "b")


def test_served_judge_says_what_failed(server: HTTPServer) -> None:
    server.status = 500
    with pytest.raises(RewardError, match="500"):
        served_judge(address(server), "m")("x", "a", "b")
    with pytest.raises(ConfigError, match="http"):
        served_judge("file:///etc/hosts", "m")
    with pytest.raises(ConfigError, match="{b}"):
        served_judge("http://h", "m", question="{context} {a}")


def test_calibration_by_hand() -> None:
    p = [0.0, 0.05, 0.1, 0.95, 1.0, 0.55]
    right = [False, False, True, True, True, False]
    found = calibration(p, right)
    assert found.accuracy == pytest.approx(0.5)
    assert found.confidence == pytest.approx(sum(p) / 6)
    assert [b.count for b in found.bins] == [3, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    expected = (3 * abs(1 / 3 - 0.05) + 1 * 0.55 + 2 * (1 - 0.975)) / 6
    assert found.ece == pytest.approx(expected)
    assert found.bins[0].accuracy == pytest.approx(1 / 3)
    assert math.isnan(found.bins[1].confidence)


def test_calibrated_predictions_have_small_error_and_overconfident_ones_have_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    right = rng.random(20_000) < p
    assert calibration(p, right).ece < 0.02
    assert calibration(np.clip(p + 0.2, 0, 1), right).ece > 0.1


@pytest.mark.parametrize(
    ("p", "right", "bins"),
    [([], [], 10), ([0.5], [], 10), ([1.2], [True], 10), ([0.5], [2], 10), ([0.5], [1], 0)],
)
def test_calibration_checks_its_input(p, right, bins) -> None:
    with pytest.raises(DataError):
        calibration(p, right, bins)


def test_p_value_is_that_of_all_sign_flips() -> None:
    d = [0.3, -0.1, 0.4, 0.25, -0.05, 0.6, 0.2, 0.1]
    flips = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in itertools.product((1, -1), repeat=8)
    ]
    exact = sum(f >= abs(sum(d)) - 1e-12 for f in flips) / len(flips)
    found = paired_test(d, [0.0] * 8, resamples=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)  # seven standard errors
    assert found.difference == pytest.approx(sum(d) / 8)
    assert found == paired_test(d, [0.0] * 8, resamples=20_000)


def test_interval_is_the_bootstrap_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
    found = paired_test(a, b)
    d = a - b
    error = d.std() / 20
    assert found.low == pytest.approx(d.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(d.mean() + 1.96 * error, abs=0.15 * error)


def test_pairing_matters() -> None:
    """A small gain on every example is sure, though the examples differ far more; no gain is not."""
    rng = np.random.default_rng(2)
    base = rng.normal(0, 10, 60)
    gain = base + 0.5 + rng.normal(0, 0.3, 60)
    assert paired_test(gain, base).p_value < 0.001
    assert paired_test(rng.permutation(gain), base).p_value > 0.05
    same = paired_test(base, base)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)


def test_paired_test_checks_its_input() -> None:
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(DataError):
            paired_test(a, b)
