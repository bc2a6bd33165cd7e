"""Samples corrected at test time: the exact posterior by enumeration, from policies that are far from it."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import tiny_policy
from stats import LEVEL, g_test
from structured_cases import ROW as LIST_ROW
from structured_cases import SUPPORTS, two_latents

from amortlm import LanguageModel, Policy, Posterior, Support, constraint, exact
from amortlm.cli import main
from amortlm.errors import ConfigError, RewardError
from amortlm.inference import correct as module
from amortlm.inference.correct import Weighted, even, islands
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.posterior import Samples
from amortlm.targets.base import Target
from amortlm.types import Rollouts

ROW = {"x": "the dog", "y": " ran"}
SUPPORT = Support(stop=(".", "!"), max_tokens=3, allowed_tokens=(" a", " cat", "s"))
METHODS = ("sir", "smc", "mh")
CLOSE = 0.05
N, BUDGET = 1000, 8000  # 1,000 exact draws are .02 from the posterior below themselves
SIGMAS = 5.6  # two-sided tail 2e-8, below stats.LEVEL


@pytest.fixture
def large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models waste time on small ones."""
    monkeypatch.setattr("amortlm.inference.correct.BATCH", 2000)


def calm(lm: LanguageModel, scale: float) -> LanguageModel:
    """The model with smaller weights: a posterior that is spread out."""
    model = copy.deepcopy(lm.model)
    for p in model.parameters():
        p.data *= scale
    return LanguageModel(model, lm.tokenizer)


def untrained(lm: LanguageModel) -> Posterior:
    """q = p, which does not know y."""
    lm = calm(lm, 0.7)
    return Posterior(Policy(lm, "{x}", SUPPORT), lm.log_prob("{z}{y}", given="{x}"))


def bad(lm: LanguageModel, extra: Target | None = None) -> Posterior:
    """q has been moved away at random."""
    lm = calm(lm, 0.7)
    target = lm.log_prob("{z}{y}", given="{x}")
    return Posterior(tiny_policy(lm, "{x}", SUPPORT), target + extra if extra else target)


def distance(posterior: Posterior, samples: list[list[int]], row: dict[str, str] = ROW) -> float:
    """Total variation of equally weighted samples to the exact posterior."""
    assert posterior.target is not None
    truth = exact.enumerate_posterior(posterior.target, posterior.policy.support, row)
    counts = Counter(map(tuple, samples))
    probs = dict(zip(map(tuple, truth.completions), truth.log_p.exp().tolist(), strict=True))
    assert counts.keys() <= probs.keys()
    return sum(abs(counts[z] / len(samples) - p) for z, p in probs.items()) / 2


def tokens(samples: Samples) -> list[list[int]]:
    return [s.tokens for s in samples]


# The posterior, whatever the policy


@pytest.mark.usefixtures("large_batches")
@pytest.mark.parametrize("make", [untrained, bad])
def test_every_method_reaches_the_posterior(one_lm: LanguageModel, make: object) -> None:
    posterior = make(one_lm)  # type: ignore[operator]
    assert distance(posterior, tokens(posterior.sample(ROW, N))) > 4 * CLOSE, "q alone is far off"
    for method in METHODS:
        samples = posterior.sample(ROW, N, correct=method, budget=BUDGET)
        assert distance(posterior, tokens(samples)) < CLOSE, method
        assert {s.weight for s in samples} == {1 / N}


@pytest.mark.parametrize("method", METHODS)
def test_too_small_a_budget_leaves_a_bias(one_lm: LanguageModel, method: str) -> None:
    """One sample a call, independent, out of two draws."""
    posterior = bad(one_lm)
    assert posterior.target is not None
    truth = exact.enumerate_posterior(posterior.target, posterior.policy.support, ROW)
    runs = [posterior.sample(ROW, 1, correct=method, budget=2, seed=i)[0] for i in range(60)]
    counts = Counter(tuple(s.tokens) for s in runs)
    observed = torch.tensor([counts[tuple(z)] for z in truth.completions])
    assert g_test(observed, truth.log_p.exp()) < LEVEL


@pytest.mark.usefixtures("large_batches")
@pytest.mark.parametrize("method", METHODS)
def test_a_hard_constraint(one_lm: LanguageModel, method: str) -> None:
    posterior = bad(one_lm, constraint.contains("cat"))
    samples = posterior.sample(ROW, N, correct=method, budget=BUDGET, seed=2)
    assert all("cat" in s.text and math.isfinite(s.log_reward or 0.0) for s in samples)
    assert distance(posterior, tokens(samples)) < CLOSE
    assert distance(posterior, tokens(posterior.sample(ROW, N))) > 4 * CLOSE


@pytest.mark.usefixtures("large_batches")
def test_lists(one_lm: LanguageModel) -> None:
    lm = calm(one_lm, 0.5)
    posterior = Posterior(tiny_policy(lm, "{x}", SUPPORTS["exactly two"]), two_latents(lm))
    assert distance(posterior, tokens(posterior.sample(LIST_ROW, N)), LIST_ROW) > 8 * CLOSE
    for method in METHODS:
        samples = posterior.sample(LIST_ROW, N, correct=method, budget=BUDGET)
        # 68 lists: 1,000 exact draws are .04 off.
        assert distance(posterior, tokens(samples), LIST_ROW) < 2 * CLOSE, method
        assert all(s.statements is not None and len(s.statements) == 2 for s in samples)


# What is reported


def test_without_a_correction_nothing_has_changed(one_lm: LanguageModel) -> None:
    posterior = bad(one_lm)
    samples = posterior.sample(ROW, 300, seed=3)
    assert samples == posterior.sample(ROW, 300, correct="none", seed=3)
    rollouts, *_ = module.draw(posterior.policy, None, ROW, 300, seed=3)
    assert tokens(samples) == rollouts.completions()
    log_w = torch.tensor([s.log_reward - s.log_q for s in samples]).double()  # type: ignore[operator]
    weights = log_w.softmax(0)
    torch.testing.assert_close(
        torch.tensor([s.weight for s in samples]).double(), weights, atol=1e-6, rtol=1e-4
    )
    assert (samples.method, samples.draws, samples.acceptance_rate) == ("none", 300, None)
    assert samples.ess == pytest.approx(1 / weights.square().sum().item(), rel=1e-4)
    assert samples.log_z == pytest.approx(log_w.logsumexp(0).item() - math.log(300), abs=1e-5)


def test_sir_resamples_the_draws_of_the_policy(one_lm: LanguageModel) -> None:
    posterior = bad(one_lm)
    pool = posterior.sample(ROW, 300, seed=1)
    got = posterior.sample(ROW, 40, correct="sir", budget=300, seed=1)
    assert (got.log_z, got.ess, got.draws) == (pool.log_z, pool.ess, 300)
    # Systematic: each completion appears as often as the weights of its copies say together, less than one off.
    mass: Counter[tuple[int, ...]] = Counter()
    for s in pool:
        mass[tuple(s.tokens)] += s.weight  # type: ignore[assignment, operator]
    drawn = Counter(map(tuple, tokens(got)))
    assert drawn.keys() <= mass.keys()
    assert all(abs(drawn[z] - 40 * mass[z]) < 1 for z in mass)
    by_tokens = {tuple(s.tokens): (s.log_q, s.log_reward) for s in pool}
    for s in got:
        assert (s.log_q, s.log_reward) == pytest.approx(by_tokens[tuple(s.tokens)], abs=1e-4)


def test_resampled_draws_come_in_random_order(one_lm: LanguageModel) -> None:
    rollouts, *_ = module.draw(bad(one_lm).policy, None, ROW, 64, seed=0)
    log_w = torch.tensor([0.5, 0.0, 0.3, 0.2, *[0.0] * 60]).log()
    named = Weighted(rollouts, torch.arange(64.0), torch.zeros(64), log_w, 64)
    first = []
    for seed in range(40):
        index = named.resample(10, seed).log_q.tolist()
        assert Counter(index) == {0: 5, 2: 3, 3: 2}
        first.append(index[0])
    assert set(first) == {0, 2, 3}


def test_log_z_of_smc_is_unbiased(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over islands of three particles. Control: the mean of log Z-hat is not log Z, even of the runs where Z-hat > 0."""
    monkeypatch.setattr("amortlm.inference.correct.BATCH", 4)
    monkeypatch.setattr(Weighted, "resample", lambda self, n, seed: self)  # which would raise where Z-hat = 0
    posterior = bad(one_lm, constraint.contains("cat"))
    assert posterior.target is not None
    truth = exact.enumerate_posterior(posterior.target, posterior.policy.support, ROW).log_z
    runs = [posterior.sample(ROW, 6, correct="smc", budget=6, seed=i).log_z for i in range(100)]
    log_ratio = torch.tensor(runs).double() - truth

    def z_score(x: torch.Tensor) -> float:
        return abs(x.mean().item()) / (x.std().item() / math.sqrt(len(x)))

    assert z_score(log_ratio.exp() - 1) < SIGMAS
    assert z_score(log_ratio[torch.isfinite(log_ratio)]) > SIGMAS


def test_islands_are_weighed_together(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z-hat is the mean over all particles, of unequal islands too."""
    monkeypatch.setattr(module, "BATCH", 6)
    posterior = bad(one_lm)
    target = posterior.target
    assert target is not None
    got = islands(posterior.policy, target, ROW, 11, seed=5)
    alone = [smc(posterior.policy, target, ROW, num_particles=5 + i, seed=(5, 5 * i)) for i in range(2)]
    z = sum((5 + i) / 11 * math.exp(part.log_z) for i, part in enumerate(alone))
    assert got.log_z == pytest.approx(math.log(z))
    assert got.rollouts.completions() == [c for part in alone for c in part.rollouts.completions()]
    assert got.draws == sum(part.completions_scored for part in alone)


def test_what_was_spent(one_lm: LanguageModel) -> None:
    posterior = bad(one_lm)
    assert posterior.sample(ROW, 2, correct="sir").draws == 256
    assert posterior.sample(ROW, 20, correct="sir").draws == 320
    particles = posterior.sample(ROW, 20, correct="smc")
    assert particles.draws > 320, "futures drawn anew count"
    assert particles.ess is not None
    assert 1 <= particles.ess <= 320
    mh = posterior.sample(ROW, 20, correct="mh", budget=110)
    assert mh.draws == 27 + 20 * 4
    assert mh.acceptance_rate is not None
    assert 0 < mh.acceptance_rate < 1
    assert (mh.ess, mh.log_z, particles.acceptance_rate) == (None, None, None)
    assert json.loads(json.dumps(mh.summary())) == {
        "method": "mh", "draws": 107, "ess": None, "log_z": None, "acceptance_rate": mh.acceptance_rate,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """In several batches, which are not copies of each other."""
    monkeypatch.setattr("amortlm.inference.correct.BATCH", 16)
    posterior = bad(one_lm)

    def run(seed: object) -> Samples:
        return posterior.sample(ROW, 40, correct=method, budget=160, seed=seed)

    torch.manual_seed(1)
    first = run(("a", 1))
    torch.manual_seed(2)
    again = run(("a", 1))
    assert again == first
    assert again.summary() == first.summary()
    assert tokens(run(("a", 2))) != tokens(first)
    assert len(first) == 40
    assert tokens(first)[:13] != tokens(first)[13:26]


def test_every_chain_has_its_own_start(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over batches: the resampled draws, each once."""
    posterior = bad(one_lm)
    target, starts = posterior.target, []
    assert target is not None

    def record(*args: Any, initial: Rollouts, **kwargs: Any) -> Any:
        starts.extend(initial.completions())
        return metropolis_hastings(*args, initial=initial, **kwargs)

    monkeypatch.setattr(module, "metropolis_hastings", record)
    monkeypatch.setattr(module, "BATCH", 8)
    module.mh(posterior.policy, target, ROW, 20, budget=160, seed=4)
    pool = module.weigh(posterior.policy, target, ROW, 40, seed=4)
    assert starts == pool.resample(20, 4).rollouts.completions()


def test_pieces_are_even() -> None:
    assert list(even(257, 256)) == [(0, 128), (128, 257)]
    assert list(even(5, 8)) == [(0, 5)]
    assert [high - low for low, high in even(20, 8)] == [6, 7, 7]


# Errors


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_resample(one_lm: LanguageModel, method: str) -> None:
    posterior = bad(one_lm, constraint.contains("dog"))
    with pytest.raises(RewardError, match="have R = 0, so none can be resampled; .* larger budget"):
        posterior.sample(ROW, 4, correct=method, budget=32)
    plain = posterior.sample(ROW, 4)
    assert (plain.ess, plain.log_z) == (0.0, -math.inf)


def test_a_tool_takes_sir_only(one_lm: LanguageModel) -> None:
    support = Support(stop=".", max_tokens=3, allowed_tokens=(" a", " cat", "s"), tool="calculator")
    posterior = Posterior(tiny_policy(one_lm, "{x}", support), one_lm.log_prob("{z}{y}", given="{x}"))
    assert len(posterior.sample(ROW, 4, correct="sir", budget=16)) == 4
    for method in ("smc", "mh"):
        with pytest.raises(ConfigError, match='correct="sir", or --correct sir'):
            posterior.sample(ROW, 4, correct=method, budget=16)


def test_errors_say_what_to_do(one_lm: LanguageModel) -> None:
    posterior = bad(one_lm)
    with pytest.raises(ConfigError, match="unknown correction 'smcc'; did you mean 'smc'"):
        posterior.sample(ROW, correct="smcc")
    with pytest.raises(ConfigError, match="budget is for corrected samples"):
        posterior.sample(ROW, budget=64)
    for method, least in (("sir", 8), ("smc", 8), ("mh", 16)):
        with pytest.raises(
            ConfigError, match=f"a budget of 7 is too small for n=8: {method} needs at least {least}"
        ):
            posterior.sample(ROW, 8, correct=method, budget=7)
        assert len(posterior.sample(ROW, 8, correct=method, budget=least)) == 8
    with pytest.raises(ConfigError, match="n must be at least 1"):
        posterior.sample(ROW, 0, correct="sir")
    with pytest.raises(ConfigError, match="has no target, .* pass target= .* --trust MODULE"):
        Posterior(posterior.policy, None).sample(ROW, correct="sir")


# The command


@pytest.fixture
def saved(one_lm: LanguageModel, tmp_path: Path) -> Path:
    one_lm.model.save_pretrained(tmp_path / "model")
    one_lm.tokenizer.save_pretrained(tmp_path / "model")
    lm = LanguageModel.from_pretrained(str(tmp_path / "model"))
    target = lm.log_prob("{z}{y}", given="{x}")
    Posterior(Policy(lm, "{x}", SUPPORT), target).save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_the_command_corrects_and_says_how(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sample", str(saved), "--column", "x=the dog", "--column", "y= ran", "-n", "3", "--seed", "1"]
    posterior = Posterior.from_pretrained(saved)
    for method in METHODS:
        expected = posterior.sample(ROW, 3, correct=method, budget=48, seed=1)
        assert main([*command, "--correct", method, "--budget", "48"]) == 0
        *_, last, blank = capfd.readouterr().out.split("\n")[:-1]
        assert blank == ""
        assert last.startswith(f"{method}: {expected.draws} draws, ")
        if method == "mh":
            assert last.endswith(f"acceptance rate {expected.acceptance_rate:.2f}")
        else:
            assert last.endswith(f"ESS {expected.ess:.1f}, log Z {expected.log_z:.3f}")
        assert main([*command, "--correct", method, "--budget", "48", "--json"]) == 0
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert lines == [{"row": ROW, **s.to_dict(), "correction": expected.summary()} for s in expected]
    assert main([*command, "--correct", "sri"]) == 2
    assert "did you mean 'sir'?" in capfd.readouterr().err
