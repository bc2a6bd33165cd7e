"""Random numbers from a description: the stated probabilities against formulas written independently, what is held out,
the spelling of outcomes, the budgets, and that training works.

Statistical tests are seeded; each states its false-alarm rate.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stats import LEVEL, g_test
from torch import tensor

from amortlm.errors import DataError
from amortlm.lab.experiment import Context
from amortlm.lab.experiments import dice
from amortlm.lab.tasks.dice import (
    FAMILIES,
    GROUPS,
    HELD_OUT,
    PATTERN,
    SEEN,
    TAIL,
    descriptions,
    distribution,
    log_prob,
    row_of,
    until_tail,
    without_tail,
)
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.train import GFNConfig
from amortlm.types import Row

EXPERIMENT = dice.EXPERIMENT
STEPS, ROWS, SAMPLES = 2, 2, 4


def stated(family: str, **parameters: Any) -> dict[str, float]:
    """Outcome, without its space -> probability."""
    row = row_of(family, parameters, FAMILIES[family].phrasings[0])
    return {text.removeprefix(" "): math.exp(v) for text, v in distribution(row).items()}


def context(lm: LanguageModel, folder: Path = Path(), **changed: Any) -> Context:
    small = {"steps": STEPS, "rows_per_step": ROWS, "num_samples": SAMPLES, "adapter": 2}
    settings = {**EXPERIMENT.presets["smoke"], **small, **changed}
    return Context(settings, lm, EXPERIMENT.prepare(settings, lm, None), folder=folder)


# The stated probabilities


@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_sum_to_one_over_few_outcomes(name: str) -> None:
    rng = random.Random(name)
    for _ in range(40):
        parameters = FAMILIES[name].draw(rng)
        whole = FAMILIES[name].weights(**parameters)
        assert math.fsum(whole.values()) == pytest.approx(1, abs=TAIL / 50)
        found = stated(name, **parameters)
        assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
        assert math.fsum(w for k, w in whole.items() if str(k) not in found) <= TAIL
        assert 2 <= len(found) <= 200
        if FAMILIES[name].numeric:
            assert list(map(int, found)) == sorted(map(int, found))


# By each family, a second formula or a second way to count: parameters, and outcome -> probability.
FORMULAS: dict[str, tuple[Mapping[str, Any], Callable[[int], float]]] = {
    "uniform": ({"low": 3, "high": 7}, lambda k: 1 / 5),
    "die": ({"sides": 12}, lambda k: 1 / 12),
    "dice": (
        {"count": 3, "sides": 6},
        lambda k: sum(sum(t) == k for t in itertools.product(range(1, 7), repeat=3)) / 216,
    ),
    "binomial": (
        {"trials": 5, "chance": 0.3},
        lambda k: sum(0.3**k * 0.7 ** (5 - k) for t in itertools.product((0, 1), repeat=5) if sum(t) == k),
    ),
    "poisson": ({"mean": 2.5}, lambda k: math.exp(-2.5) * 2.5**k / math.factorial(k)),
    "geometric": (
        {"chance": 0.25},
        lambda k: 0.75 ** (k - 1) - 0.75**k,
    ),  # P(more than k - 1) - P(more than k)
    "exponential": (
        {"mean": 2.0},
        lambda k: math.exp(-max(0.0, k - 0.5) / 2) - math.exp(-(k + 0.5) / 2),
    ),
    "negative binomial": (  # the last success comes after k failures and 2 successes in any order
        {"successes": 3, "chance": 0.6},
        lambda k: (k + 1) * (k + 2) / 2 * 0.6**3 * 0.4**k,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_probabilities_are_those_of_a_direct_formula(name: str) -> None:
    parameters, formula = FORMULAS[name]
    for outcome, p in stated(name, **parameters).items():
        assert p == pytest.approx(formula(int(outcome)), rel=3e-6), outcome


# By each family, a way to draw from it.
SAMPLERS: dict[str, tuple[Mapping[str, Any], Callable[[random.Random], object]]] = {
    "uniform": ({"low": 90, "high": 120}, lambda rng: rng.randint(90, 120)),
    "dice": ({"count": 4, "sides": 8}, lambda rng: sum(rng.randint(1, 8) for _ in range(4))),
    "binomial": ({"trials": 30, "chance": 0.2}, lambda rng: sum(rng.random() < 0.2 for _ in range(30))),
    "normal": ({"mean": -3, "sd": 4}, lambda rng: math.floor(rng.gauss(-3, 4) + 0.5)),
    "exponential": ({"mean": 5.5}, lambda rng: math.floor(rng.expovariate(1 / 5.5) + 0.5)),
    "triangular": (
        {"low": 4, "mode": 15, "high": 20},
        lambda rng: math.floor(rng.triangular(4, 20, 15) + 0.5),
    ),
    "categories": (
        {"chances": {"red": 70, "blue": 20, "pink": 10}},
        lambda rng: rng.choices(["red", "blue", "pink"], [7, 2, 1])[0],
    ),
    "weather": (
        {"chances": {"sunny": 1, "rainy": 99}},
        lambda rng: "rainy" if rng.random() < 0.99 else "sunny",
    ),
    "coin": (
        {"chances": {"heads": 35, "tails": 65}},
        lambda rng: "heads" if rng.random() < 0.35 else "tails",
    ),
    "card": (
        {"lowest": "10", "suits": ["hearts", "spades"]},
        lambda rng: (
            f"{rng.choice(['10', 'jack', 'queen', 'king', 'ace'])} of {rng.choice(['hearts', 'spades'])}"
        ),
    ),
    "weekday": (
        {"first": "Saturday", "last": "Tuesday"},
        lambda rng: rng.choice(["Monday", "Tuesday", "Saturday", "Sunday"]),
    ),
    "month": (
        {"first": "November", "last": "February"},
        lambda rng: rng.choice(["January", "February", "November", "December"]),
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_probabilities_are_those_of_seeded_draws(name: str) -> None:
    """A G test at the false-alarm rate of the suite; draws of a neighbour of the distribution fail it."""
    parameters, draw = SAMPLERS[name]
    rng, found = random.Random(name), stated(name, **parameters)
    counts = Counter(str(draw(rng)) for _ in range(20_000))
    assert sum(counts[k] for k in counts if k not in found) <= 2, "draws of probability TAIL"
    counted, probs = tensor([counts[k] for k in found]), tensor(list(found.values()))
    assert g_test(counted, probs) > LEVEL
    assert g_test(counted.roll(1), probs) < LEVEL or len(set(found.values())) == 1
    if len(set(found.values())) == 1:
        tilted = probs * (1 + 0.5 * (tensor(range(len(probs))) / (len(probs) - 1)))
        assert g_test(counted, tilted) < LEVEL


def test_every_family_has_a_second_opinion() -> None:
    assert FORMULAS.keys() | SAMPLERS.keys() == FAMILIES.keys()


def test_the_rarest_outcomes_are_left_out() -> None:
    assert without_tail({1: 4e-7, 2: 0.5, 3: 5e-7, 4: 0.5, 5: 2e-7}) == {2: 0.5, 3: 5e-7, 4: 0.5}
    assert min(stated("binomial", trials=60, chance=0.05).values()) > 1e-8  # all 60 has 1e-78


def test_the_verifier() -> None:
    row = row_of("die", {"sides": 6}, FAMILIES["die"].phrasings[0])
    texts = [" 1", " 6", " 7", " 0", "1", " 1 ", " one", ""]
    assert log_prob(texts, [row] * len(texts)) == [pytest.approx(-math.log(6))] * 2 + [-math.inf] * 6


# Descriptions


@pytest.mark.parametrize("name", FAMILIES)
def test_every_phrasing_names_every_parameter(name: str) -> None:
    """Where a parameter changes, so does the prompt, and its value stands there."""
    family, rng = FAMILIES[name], random.Random(name)
    assert not set(family.phrasings) & set(family.unseen)
    for phrasing, _ in itertools.product((*family.phrasings, *family.unseen), range(5)):
        parameters = family.draw(rng)
        prompt = row_of(name, parameters, phrasing)["prompt"]
        assert "{" not in prompt
        for value in parameters.values():
            if isinstance(value, Mapping):
                assert all(f"{k} {v} %" in prompt for k, v in value.items())
            elif isinstance(value, list):
                assert all(word in prompt for word in value)
            else:
                assert re.search(rf"(?<![\d.]){re.escape(str(value))}(?![\d.]*\d)", prompt), (prompt, value)


def test_what_is_held_out() -> None:
    found = descriptions(400, 39)
    assert len(found.train) == len({row["prompt"] for row in found.train}) == 400
    assert list(found.test) == list(GROUPS)
    assert all(len(rows) == 39 for rows in found.test.values())
    assert {row["family"] for row in found.train} == set(SEEN) == set(FAMILIES) - set(HELD_OUT)
    trained = {key(row) for row in found.train}
    for group, rows in found.test.items():
        assert not trained & {key(row) for row in rows}
        assert {row["family"] for row in rows} == set(HELD_OUT if group == "families" else SEEN)
    assert len({key(row) for rows in found.test.values() for row in rows}) == 3 * 39
    for row in [*found.train, *found.test["parameters"]]:
        assert from_phrasings(row, FAMILIES[row["family"]].phrasings)
        assert not from_phrasings(row, FAMILIES[row["family"]].unseen)
    assert all(from_phrasings(row, FAMILIES[row["family"]].unseen) for row in found.test["phrasings"])
    assert descriptions(400, 39) == found
    assert descriptions(400, 39, seed=1) != found
    with pytest.raises(DataError, match="ask for fewer"):
        descriptions(10_000, 3)


def key(row: Row) -> str:
    return repr((row["family"], row["parameters"]))


def from_phrasings(row: Row, phrasings: Any) -> bool:
    return any(row_of(row["family"], row["parameters"], p) == row for p in phrasings)


def test_each_outcome_is_in_the_support_and_spelled_in_one_way(embedded: LanguageModel) -> None:
    """Of two spellings the target rejects the one that is not the tokenizer's own."""
    problem, tests = context(embedded, train_descriptions=104, test_descriptions=13).data
    law, target = problem.support.bind(embedded), problem.target.bind(embedded)
    posterior = problem.posterior(context(embedded), problem.policy(context(embedded)))
    for row in [*problem.rows, *(row for rows in tests.values() for row in rows)]:
        texts = list(distribution(row))
        spelled = [embedded.encode_continuation(text) for text in texts]
        assert all(
            re.fullmatch(PATTERN, text[1:]) and law.contains(s)
            for text, s in zip(texts, spelled, strict=True)
        )
        assert [embedded.decode(s) for s in spelled] == texts
        assert len({*map(tuple, spelled)}) == len(texts)
    row = row_of("card", {"lowest": "10", "suits": ["hearts"]}, FAMILIES["card"].phrasings[0])
    apart = [
        [embedded.token_id(t) for t in parts]
        for parts in ([" 1", "0", " of", " heart", "s"], [" ", "1", "0", " of", " heart", "s"])
    ]
    rollouts = posterior.policy.rollouts([row], [apart])
    assert target.score_final(rollouts).tolist() == [pytest.approx(-math.log(5)), -math.inf]


# Methods


@pytest.mark.parametrize("method", ["sft", "ppo", "gflownet-vargrad", "gflownet-forward-kl"])
def test_trained_methods_get_equally_many_completions(
    method: str, embedded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    stated_samples = dice.stated_samples
    monkeypatch.setattr(
        dice, "stated_samples", lambda *a: (found := stated_samples(*a), drawn.append(len(found)))[0]
    )
    given = context(embedded, tmp_path)
    trained = EXPERIMENT.methods[method](given)
    start = sum(len(distribution(row)) for row in given.data[0].rows)  # of the GFlowNet's buffer
    extra = start if method.startswith("gflownet") else 0
    assert trained.reward_evaluations + sum(drawn) - extra == STEPS * ROWS * SAMPLES
    assert (trained.reward_evaluations == 0) == (method == "sft")
    before = EXPERIMENT.methods["untrained"](context(embedded, tmp_path))
    outcomes = [EXPERIMENT.evaluate(context(embedded), t) for t in (before, trained)]
    assert outcomes[0].metrics != outcomes[1].metrics, "two steps have moved it"
    assert all(0 <= outcomes[1].metrics[f"tv_{group}"] <= 1 for group in GROUPS)


def test_samples_of_sft() -> None:
    row = row_of("coin", {"chances": {"heads": 30, "tails": 70}}, "")
    heads = dice.stated_samples(row, 10_000, random.Random(0)).count(" heads")
    assert abs(heads - 3000) < 5 * math.sqrt(10_000 * 0.3 * 0.7)  # false alarms: 6e-7


def test_distances() -> None:
    p, rng = np.array([0.5, 0.25, 0.25]), np.random.default_rng(0)
    perfect = dice.compare(p, p, False, 10, rng)
    assert (perfect["kl"], perfect["tv"], perfect["valid"]) == (0, 0, 1)
    assert "ks" not in perfect
    found = dice.compare(p, np.array([0.25, 0.25, 0.125]), True, 10, rng)
    assert found["kl"] == pytest.approx(0.75 * math.log(2))
    assert found["tv"] == pytest.approx(0.375)  # half of .25 + 0 + .125 + .375 on anything else
    assert found["valid"] == pytest.approx(0.625)
    assert found["ks"] == found["chi"] == 0


def test_floor_of_ppo_is_the_penalty_of_training() -> None:
    assert GFNConfig.hard_penalty == -dice.FLOOR


def test_presets_state_the_same_settings() -> None:
    presets = EXPERIMENT.presets
    assert presets["smoke"].keys() == presets["small"].keys() == presets["real"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "gflownet-vargrad"])
def test_training_on_a_single_description(method: str, embedded: LanguageModel, tmp_path: Path) -> None:
    row = row_of("binomial", {"trials": 6, "chance": 0.5}, FAMILIES["binomial"].phrasings[0])
    given = context(embedded, tmp_path, steps=40, rows_per_step=1, num_samples=64, adapter=8)
    problem, tests = given.data
    given = replace(given, data=(replace(problem, rows=[row]), tests))
    before, after = (
        total_variation(EXPERIMENT.methods[m](given).sampler, row) for m in ("untrained", method)
    )
    assert before > 0.6
    assert after < 0.25


def total_variation(posterior: Posterior, row: Row) -> float:
    p, q = dice.probabilities(posterior, row)
    return dice.compare(p, q, True, 1, np.random.default_rng(0))["tv"]


def test_the_report(tmp_path: Path) -> None:
    """The same bytes for the same results, and what the published models were not."""
    example = {
        "group": "families",
        "prompt": "x" * 99,
        "outcomes": ["1", "2"],
        "p": [0.5, 0.5],
        "q": [0.1, 0.2],
    }
    runs = {m: [{"details": {"examples": [example] * 6}}] for m in EXPERIMENT.methods}
    images = []
    for _ in range(2):
        assert dice.figures({"runs": runs}, tmp_path) == ["distributions.png"]
        images.append((tmp_path / "distributions.png").read_bytes())
    assert images[0] == images[1]
    text = dice.summary({"digest": {"paired": []}})
    assert "not trained for this" in text
    assert "2606.06622" in text
    assert "2601.05414" in text


def test_probabilities_that_do_not_sum_to_one() -> None:
    with pytest.raises(DataError, match="sum to 0.5, not to 1"):
        until_tail(lambda k: 0.25 if k < 2 else 0.0)
