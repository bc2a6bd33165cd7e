"""Intervals that hold at their level, and a verdict that says what a sampler is good for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from stats import LEVEL as FALSE_ALARM
from stats import binomial_tail
from tilted import ROW, blind, off, perfect

from amortlm import LanguageModel, Posterior
from amortlm.diagnostics.bounds import Interval
from amortlm.diagnostics.certificate import finite
from amortlm.diagnostics.diagnose import AVOID, CORRECT, LEVEL, TRUST, UNDECIDED, Diagnosis
from amortlm.errors import ConfigError, DataError
from amortlm.inference import pool, truth

T = TypeVar("T")
SLOW = pytest.mark.slow
LONG = [pytest.mark.slow, pytest.mark.long]

ENDS = ("log_z", "kl_qp", "kl_pq")


def misses(posterior: Posterior, runs: int, n: int, limit: int, shift: float = 0.0) -> int:
    """In how many seeded runs log Z or a divergence is outside its interval. shift: nats added to the true log Z."""
    true = posterior.diagnose(ROW, n=30)
    assert true.exact_log_z is not None
    assert true.distance is not None
    values = {"log_z": true.exact_log_z + shift, "kl_qp": true.distance.kl_qp, "kl_pq": true.distance.kl_pq}
    out = 0
    for run in range(runs):
        bounds = posterior.diagnose(ROW, n=n, seed=("run", run), limit=limit).bounds
        ends = {k: getattr(bounds, k) for k in ENDS}
        # 1e-6: divergences of a perfect sampler are 0 up to rounding.
        out += not all(ends[k].lower - 1e-6 <= values[k] <= ends[k].upper + 1e-6 for k in ENDS)
    return out


@pytest.mark.parametrize(
    "source", ["enumeration", pytest.param("sir", marks=SLOW), pytest.param("mcmc", marks=LONG)]
)
def test_intervals_hold_at_their_level(
    one_lm: LanguageModel, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "mcmc":  # weights may not be used
        monkeypatch.setattr(pool, "KHAT", -math.inf)
        monkeypatch.setattr(pool, "REPEATS", math.inf)
    weight, limit = (0.8, 84) if source == "enumeration" else (0.4, 0)
    posterior = off(one_lm, weight)
    assert posterior.diagnose(ROW, n=48, limit=limit).truth.source == source
    found = misses(posterior, 15, 48, limit)
    assert binomial_tail(found, 15, 1 - LEVEL) > FALSE_ALARM, found


def test_a_wrong_log_z_is_outside(one_lm: LanguageModel) -> None:
    """The control: intervals are not so wide that they hold everything."""
    assert misses(off(one_lm), 5, 512, 84, shift=0.5) == 5


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Called once; afterwards it gives the same again, whatever it is asked."""
    found: list[T] = []

    def remembered(*args: object) -> T:
        if not found:
            found.append(function(*args))
        return found[0]

    return remembered


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["blind", *(pytest.param(name, marks=pytest.mark.long) for name in ("off", "perfect", "far"))]
)
def test_500_runs_hold_at_their_level(
    one_lm: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = {
        "perfect": perfect(one_lm), "off": off(one_lm), "far": off(one_lm, 2.5), "blind": blind(one_lm)[0]
    }[name]  # fmt: skip
    for name in ("enumerate_posterior", "policy_log_probs"):  # the same in every run
        monkeypatch.setattr(truth, name, once(getattr(truth, name)))
    found = misses(posterior, 500, 64, 84)
    assert found <= 5, "at least 99 %"


# Verdicts


@pytest.mark.parametrize("limit", [84, 0], ids=["exact", "sampled"])
def test_verdicts_on_known_samplers(one_lm: LanguageModel, limit: int) -> None:
    good = perfect(one_lm).diagnose(ROW, limit=limit)
    assert (good.verdict, good.correct) == (TRUST, None)
    fair = off(one_lm, 1.2).diagnose(ROW, limit=limit)
    assert (fair.verdict, fair.correct) == (CORRECT, "sir")
    assert fair.gap > 0.1
    posterior, missed = blind(one_lm)
    bad = posterior.diagnose(ROW, limit=limit, gold=[[missed]])
    assert (bad.verdict, bad.correct) == (AVOID, None)
    assert "Train for longer" in str(bad)
    assert "Train for longer" not in str(fair)
    assert bad.importance.ess > 0.99, "the control: nothing in q's own weights tells"
    assert good.truth.source == ("enumeration" if limit else "sir")


def test_chains_left_out(one_lm: LanguageModel) -> None:
    """A verdict that needs no chains is the same without; one that does is left open, in every form of the figures."""
    for posterior in (perfect(one_lm), off(one_lm, 1.2)):
        quick, whole = (posterior.diagnose(ROW, limit=0, chains=chains) for chains in (False, True))
        assert quick.to_dict() == whole.to_dict()
    posterior, missed = blind(one_lm)
    found = posterior.diagnose(ROW, limit=0, gold=[[missed]], chains=False)
    assert (found.verdict, found.correct, found.truth.source) == (UNDECIDED, None, truth.LEFT_OUT)
    assert found.gap == math.inf
    assert "chains left out" in str(found)
    assert "not decided: weights do not suffice" in str(found)
    assert "Train for longer" not in str(found)


def test_an_unfounded_upper_end_is_not_reported(one_lm: LanguageModel) -> None:
    posterior, missed = blind(one_lm)
    found = posterior.diagnose(ROW, limit=0, gold=[[missed]])
    assert found.truth.source == "mcmc (not converged)"
    assert found.truth.draws == 0
    assert [getattr(found.bounds, k).upper for k in ENDS] == [math.inf] * 3
    assert (found.gap, found.bounds.kl_pq.lower) == (math.inf, 0.0)
    assert found.bounds.log_z.lower == pytest.approx(0.0, abs=0.1), "the lower end needs no truth"
    assert finite(found.to_dict())["log_z_high"] is None


def test_weights_too_wild_to_correct_with(one_lm: LanguageModel) -> None:
    found = off(one_lm, 8.0).diagnose(ROW)
    assert found.verdict == AVOID
    assert found.distance is not None
    n = found.importance.n
    assert n * found.importance.ess < 10 or n < 10 * math.exp(found.distance.kl_pq)


def test_the_gap_bounds_total_variation(one_lm: LanguageModel) -> None:
    for strength in (0.0, 0.3, 1.0):
        exact = off(one_lm, strength).diagnose(ROW)
        sampled = off(one_lm, strength).diagnose(ROW, limit=0)
        assert exact.distance is not None
        assert exact.tv_high == exact.distance.total_variation <= sampled.tv_high < 1
        assert exact.gap == min(exact.distance.kl_qp, exact.distance.kl_pq)
        assert sampled.gap_low - 1e-6 <= exact.gap <= sampled.gap  # rounding: q is the posterior at first
        assert exact.gap_low == exact.gap


def test_a_higher_level_is_wider(one_lm: LanguageModel) -> None:
    low, high = (off(one_lm).diagnose(ROW, limit=0, level=x).bounds for x in (0.8, 0.999))
    for narrow, wide in ((getattr(low, k), getattr(high, k)) for k in ENDS):
        assert wide.lower <= narrow.lower <= narrow.upper < wide.upper
    assert (low.level, high.level) == (0.8, 0.999)


def test_the_table_is_for_people(one_lm: LanguageModel) -> None:
    exact = off(one_lm, 1.2).diagnose([ROW, {"x": "a"}])
    table, legend = str(exact).split("\n\n")
    head, _, *lines = table.splitlines()
    assert len(lines) == 2
    assert "verdict" in head
    assert max(map(len, str(exact).splitlines())) <= 130
    assert "use with correction (sir)" in lines[0]
    assert exact.rows[0].distance is not None
    assert f"{exact.rows[0].distance.kl_pq:.3g}" in lines[0].split()
    assert "nats" in legend
    assert "0.99" in legend
    assert "256 samples" in legend
    assert "neither visits" not in legend, "nothing is unseen where everything was listed"
    sampled = off(one_lm, 1.2).diagnose(ROW, limit=0)
    kl_qp = sampled.bounds.kl_qp
    assert f"{kl_qp.lower:.3g} .. {kl_qp.upper:.3g}".replace("0.0 ", "0 ") in str(sampled)
    assert "neither visits" in str(sampled)
    unknown = replace(sampled, bounds=replace(sampled.bounds, kl_qp=Interval(0.5, math.inf)))
    assert "0.5 .. ?" in str(unknown)
    assert str(Diagnosis([unknown])) == str(unknown)


def test_reports_are_json(one_lm: LanguageModel) -> None:
    """By the names that files of earlier versions have."""
    exact = perfect(one_lm).diagnose(ROW, 30).to_dict()
    assert json.loads(json.dumps(finite(exact)))["verdict"] == TRUST
    known = [
        "n",
        "ess",
        "khat",
        "elbo",
        "log_z",
        "log_w_variance",
        "log_reward",
        "valid",
        "accepted_elbo",
        "num_distinct",
        "distinct",
        "distinct_1",
        "distinct_2",
        "edit_distance",
        "log_z_low",
        "log_z_high",
        "kl_qp_low",
        "kl_qp_high",
        "kl_pq_low",
        "kl_pq_high",
        "level",
        "truth",
        "truth_draws",
        "rhat",
        "pool_khat",
        "pool_ess",
        "sir_tv_high",
        "exact_log_z",
        "total_variation",
        "kl_qp",
        "kl_pq",
        "gap",
        "tv_high",
        "verdict",
        "correct",
    ]
    assert list(exact) == known
    sampled = perfect(one_lm).diagnose(ROW, 30, limit=0).to_dict()
    assert list(sampled) == [
        k for k in known if k not in ("exact_log_z", "total_variation", "kl_qp", "kl_pq")
    ]


def test_bad_input(one_lm: LanguageModel) -> None:
    posterior = perfect(one_lm)
    with pytest.raises(DataError, match="one list per row"):
        posterior.diagnose([ROW, ROW], gold=[[]])
    with pytest.raises(ConfigError, match="level must lie between 0 and 1"):
        posterior.diagnose(ROW, level=1.5)
