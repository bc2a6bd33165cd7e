"""benchmarks/posteriors: its laws are those of the library's samplers, its distances those of the definitions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.posteriors import cases, digest, laws, methods, report
from benchmarks.posteriors.cases import Case, model, policy_law, truth_of
from benchmarks.posteriors.experiment import EXPERIMENT, methods_of
from benchmarks.posteriors.smc_law import between, smc_law
from reference import tiny_lm, tiny_tokenizer
from stats import LEVEL, g_test

from amortlm import Policy, default_lora
from amortlm.inference.exact import distance, policy_log_probs
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.lab import command, runner

WORDS = "a the cat dog"
CASE = Case("tiny", "the cat", [model("the cat", temperature=0.4)], WORDS, 2)
RUNS = 300  # of the library's sampler
HARD = Case("hard", "the cat", [model("the dog"), {"contains": ["cat"]}], WORDS, 3)
TOLD = Case("told", "the cat", [model("the dog"), {"contains": ["cat"]}], WORDS, 3, pattern="(.* )?cat( .*)?")
VERIFIED = Case("verified", "the cat", [model("the cat"), cases.VERIFIER], WORDS, 3)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(3)
    return tiny_lm("llama", tiny_tokenizer(), tied=False)


def make(case, lm):
    policy = Policy(lm, case.prompt, case.support(), default_lora(2))
    target = case.build(lm)
    return policy, target, truth_of(target, policy), policy_law(policy)


def counts(truth, completions):
    number = {tuple(z): i for i, z in enumerate(truth.completions)}
    return torch.bincount(torch.tensor([number[tuple(z)] for z in completions]), minlength=len(number))


@pytest.mark.parametrize("case", [CASE, HARD, TOLD, VERIFIED], ids=lambda c: c.name)
def test_truth_and_the_law_of_the_policy(case, lm):
    policy, _, truth, log_q = make(case, lm)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    log_q = policy_law(policy)
    held = np.array([policy.support.contains(z) for z in truth.completions])
    assert not np.exp(log_q[~held]).any()
    assert not truth.p[~held].any()
    exact = torch.full((len(held),), -torch.inf, dtype=torch.float64)
    exact[torch.tensor(held)] = policy_log_probs(policy, {})
    np.testing.assert_allclose(log_q, exact.numpy(), atol=1e-4)
    space, choices = truth.space, policy.support.allowed.nonzero().squeeze(1).tolist()
    for i, z in enumerate(truth.completions):  # the tree's numbers are those of the enumeration
        node = 0
        for token in z:
            node = 1 + node * space.width + choices.index(token)
        assert node == space.first + i
    law = laws.Law(np.exp(log_q))
    d = distance(exact, torch.tensor(truth.p).log())
    assert law.total_variation(truth.p) == pytest.approx(d.total_variation, abs=1e-4)
    assert law.kl(truth.p) == pytest.approx((d.kl_qp, d.kl_pq), abs=1e-3)


def test_a_constraint_told_to_the_support_leaves_the_posterior_as_it_is(lm):
    (_, _, hard, _), (_, _, told, log_q) = make(HARD, lm), make(TOLD, lm)
    np.testing.assert_allclose(told.p, hard.p, atol=1e-6)
    assert told.log_z == pytest.approx(hard.log_z, abs=1e-5)
    assert np.array_equal(np.isneginf(log_q), hard.p == 0)


def test_what_ends_with_nothing_counts_as_wrong():
    p = np.array([0.5, 0.5])
    law = laws.Law(np.array([0.35, 0.35]), 0.3)
    assert law.total_variation(p) == pytest.approx(0.3)
    assert law.kl(p) == pytest.approx((0.0, 0.0))


def test_floor_is_what_exact_draws_show():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(20))
    seen = [0.5 * np.abs(rng.multinomial(500, p) / 500 - p).sum() for _ in range(400)]
    assert laws.floor(p, 500) == pytest.approx(np.mean(seen), rel=0.05)


def test_best_of_two_and_rejection_by_hand():
    q, log_r = np.array([0.2, 0.3, 0.5]), np.array([0.0, 2.0, 1.0])
    pairs = np.zeros(3)
    for i in range(3):
        for j in range(3):
            pairs[i if log_r[i] >= log_r[j] else j] += q[i] * q[j]
    np.testing.assert_allclose(laws.best_of(q, log_r, 2).mass, pairs)
    p = np.exp(log_r) / np.exp(log_r).sum()
    ended = laws.rejection(q, p, 10**6)
    np.testing.assert_allclose(ended.mass, p)
    assert ended.passes == pytest.approx((p / q).max())


def test_sir_law_by_hand():
    q, w = np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.25, 1.0])
    two = np.zeros(3)
    for i in range(3):
        for j in range(3):
            total = w[i] + w[j]
            if total:
                two += q[i] * q[j] * (np.eye(3)[i] * w[i] + np.eye(3)[j] * w[j]) / total
    law = laws.sir(q, w, 2, np.random.default_rng(0))
    assert law.fail == pytest.approx(0.2**2)
    np.testing.assert_allclose(law.mass, two, atol=0.01)


@pytest.mark.parametrize("case", [CASE, HARD, TOLD], ids=lambda c: c.name)
def test_metropolis_hastings_law_is_that_of_the_library(case, lm):
    policy, target, truth, log_q = make(case, lm)
    chains = metropolis_hastings(policy, target, {}, num_chains=2000, num_steps=3, seed=1)
    found = counts(truth, chains.rollouts.completions())
    passes = laws.metropolis_hastings(
        truth.space, np.exp(log_q), laws.weights(log_q, truth.log_r), [1, 4, 4000]
    )
    start, law, end = (x.mass for x in passes)
    assert g_test(found, torch.tensor(law)) > LEVEL
    assert g_test(found, torch.tensor(start) + 1e-12) < LEVEL  # control: one that has not moved
    np.testing.assert_allclose(end, truth.p, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE, HARD, TOLD, VERIFIED], ids=lambda c: c.name)
def test_smc_law_is_that_of_the_library(case, lm):
    policy, target, truth, log_q = make(case, lm)
    law = smc_law(
        truth.space,
        np.exp(log_q),
        truth.log_r,
        4,
        np.random.default_rng(0),
        twisted=target.every_prefix,
        runs=40_000,
    )
    drawn, passes = [], []
    for seed in range(RUNS):
        particles = smc(policy, target, {}, num_particles=4, seed=seed)
        passes.append(particles.completions_scored)
        if particles.log_z > -np.inf:
            drawn += particles.resample(1, seed).completions()
    expected = torch.tensor(np.append(law.mass, law.fail))
    found = torch.cat([counts(truth, drawn), torch.tensor([RUNS - len(drawn)])])
    assert g_test(found, expected + 1e-12) > LEVEL
    assert g_test(found, torch.tensor(np.append(np.exp(log_q), 0.0)) + 1e-12) < LEVEL  # control: q itself
    assert np.mean(passes) == pytest.approx(law.passes, abs=6 * np.std(passes) / RUNS**0.5 + 0.05)


def test_bounds_of_a_simulated_distance_hold_the_truth():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(30))
    halves = [laws.Law(rng.multinomial(2000, q) / 2000) for _ in range(2)]
    low, high = between(*halves, p)
    assert low - 0.02 < laws.Law(q).total_variation(p) < high + 0.02
    low, high = between(*(laws.Law(rng.multinomial(2000, p) / 2000) for _ in range(2)), p)
    assert low < 0.02 < high


def test_passes_to_a_level():
    curve = [{"passes": n, "tv": 1 / n} for n in (1, 2, 8, 32)]
    assert digest.reach(curve, 0.25) == pytest.approx(4)
    assert digest.reach(curve, 0.01) is None
    assert digest.at(curve, 4, "tv") == pytest.approx((1 / 2 + 1 / 8) / 2)


def test_the_figure_gets_the_points_that_it_shows():
    """Of a straight line its ends; of what lies below the axis the first point."""
    tv = [0.5, 0.25, 0.125, 0.12, 0.06, 1e-3, 1e-4, 1e-5]
    curve = [{"passes": 2.0**i, "tv": v, "kl_qp": 1.0} for i, v in enumerate(tv)]
    assert digest.drawn(curve) == {"passes": [1, 4, 8, 16, 32], "tv": [0.5, 0.125, 0.12, 0.06, 1e-3]}
    assert digest.drawn(curve[6:]) == {"passes": [64], "tv": [1e-4]}
    assert digest.rounded({"a": [1.23456789, None, 3]}) == {"a": [1.234568, None, 3]}


@pytest.mark.slow
def test_the_benchmark_runs_and_reports(lm, tmp_path, monkeypatch):
    """Every table from the digest alone; the curves stay with the runs."""
    monkeypatch.setattr(runner.LanguageModel, "from_pretrained", lambda name: lm)
    monkeypatch.setattr(methods, "TOTAL", 2**10)
    cases = [CASE, VERIFIED]
    small = replace(EXPERIMENT, methods=methods_of(cases), once=frozenset({"tiny sir", "verified sir"}))
    chosen = [
        "prompted",
        "best-of-n",
        "sir",
        "smc",
        "mh",
        "ppo",
        "forward-kl",
        "gflownet-subtb",
        "gflownet-huber",
        methods.MAIN,
    ]
    argv = ["--set", "updates=2", "--set", "samples=8", "--output", str(tmp_path), "--seeds", "1"]
    command.main(small, [*argv, "--methods", *(f"* {name}" for name in chosen)])
    runs = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert len(runs) == 2 * len(chosen) - 1  # SubTB does not train on a verifier of finished text
    assert (tmp_path / "passes.png").stat().st_size > 10_000
    text = (tmp_path / "README.md").read_text()
    assert all(name in text for name in (methods.MAIN, "tiny", "verified", "SIR, 16 passes"))
    run = json.loads((tmp_path / "runs" / "tiny-sir-seed0.json").read_text())
    assert run["records"]["curves"]["sir"][-1]["tv"] < 0.01 < run["records"]["curves"]["sir"][0]["tv"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert "curves" not in json.dumps(results)
    assert results["runs"]["tiny ppo"][0]["reward_evaluations"] == 16


def test_untrained_methods_have_one_seed():
    assert EXPERIMENT.once == {n for n in EXPERIMENT.methods if n.split(" ", 1)[1] in methods.UNTRAINED}


def test_claims_count_the_worst_seed_and_name_what_was_held_out():
    cells = {"verifier": [0.01, 0.02], "echo-rare": [0.01, 0.06], "blend-far": [0.04, 0.05]}
    found = {"facts": cells, "rows": {"tv": {methods.MAIN: list(cells.values())}}, "upper": {}, "passes": {}}
    found["passes"] = {str(level): {} for level in digest.LEVELS}
    alone, held = report.claims(found)[-2:]
    assert "on 2 of 3 targets; not on echo-rare" in alone
    assert "(blend-far, echo-rare) it is so on 1" in held
