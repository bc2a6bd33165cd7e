"""Intervals that hold at their level, and a verdict that says what a sampler is good for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TypeVar

import pytest
from stats import LEVEL as FALSE_ALARM
from stats import binomial_tail
from tilted import ROW, blind, off, perfect

from amortlm import LanguageModel, Posterior
from amortlm.diagnostics.certificate import finite
from amortlm.diagnostics.diagnose import AVOID, CORRECT, LEVEL, TRUST, Diagnosis
from amortlm.errors import ConfigError, DataError
from amortlm.inference import truth

T = TypeVar("T")

ENDS = ("log_z", "kl_qp", "kl_pq")


def misses(posterior: Posterior, runs: int, n: int, limit: int, shift: float = 0.0) -> int:
    """In how many seeded runs log Z or a divergence is outside its interval. shift: nats added to the true log Z."""
    true = posterior.diagnose(ROW, n=30).reports[0]
    values = {"log_z": true["exact_log_z"] + shift, "kl_qp": true["kl_qp"], "kl_pq": true["kl_pq"]}
    out = 0
    for run in range(runs):
        r = posterior.diagnose(ROW, n=n, seed=("run", run), limit=limit).reports[0]
        # 1e-6: divergences of a perfect sampler are 0 up to rounding.
        out += not all(r[f"{k}_low"] - 1e-6 <= values[k] <= r[f"{k}_high"] + 1e-6 for k in ENDS)
    return out


@pytest.mark.parametrize("source", ["enumeration", "sir", "mcmc"])
def test_intervals_hold_at_their_level(
    one_lm: LanguageModel, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "mcmc":  # weights may not be used
        monkeypatch.setattr(truth, "KHAT", -math.inf)
        monkeypatch.setattr(truth, "REPEATS", math.inf)
    posterior, limit = off(one_lm, 0.4 if source == "mcmc" else 0.8), 84 if source == "enumeration" else 0
    assert posterior.diagnose(ROW, n=48, limit=limit).reports[0]["truth"] == source
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
@pytest.mark.parametrize("name", ["perfect", "off", "far", "blind"])
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
    good = perfect(one_lm).diagnose(ROW, limit=limit).reports[0]
    assert (good["verdict"], good["correct"]) == (TRUST, None)
    fair = off(one_lm, 1.2).diagnose(ROW, limit=limit).reports[0]
    assert (fair["verdict"], fair["correct"]) == (CORRECT, "sir")
    assert fair["gap"] > 0.1
    posterior, missed = blind(one_lm)
    bad = posterior.diagnose(ROW, limit=limit, gold=[[missed]]).reports[0]
    assert (bad["verdict"], bad["correct"]) == (AVOID, None)
    assert bad["ess"] > 0.99, "the control: nothing in q's own weights tells"
    assert good["truth"] == ("enumeration" if limit else "sir")


def test_an_unfounded_upper_end_is_not_reported(one_lm: LanguageModel) -> None:
    posterior, missed = blind(one_lm)
    report = posterior.diagnose(ROW, limit=0, gold=[[missed]]).reports[0]
    assert report["truth"] == "mcmc (not converged)"
    assert report["truth_draws"] == 0
    assert [report[f"{k}_high"] for k in ENDS] == [math.inf] * 3
    assert (report["gap"], report["kl_pq_low"]) == (math.inf, 0.0)
    assert report["log_z_low"] == pytest.approx(0.0, abs=0.1), "the lower end needs no truth"
    assert finite(report)["log_z_high"] is None


def test_weights_too_wild_to_correct_with(one_lm: LanguageModel) -> None:
    report = off(one_lm, 8.0).diagnose(ROW).reports[0]
    assert report["verdict"] == AVOID
    assert report["n"] * report["ess"] < 10 or report["n"] < 10 * math.exp(report["kl_pq"])


def test_the_gap_bounds_total_variation(one_lm: LanguageModel) -> None:
    for strength in (0.0, 0.3, 1.0):
        exact = off(one_lm, strength).diagnose(ROW).reports[0]
        sampled = off(one_lm, strength).diagnose(ROW, limit=0).reports[0]
        assert exact["tv_high"] == exact["total_variation"] <= sampled["tv_high"] < 1
        assert exact["gap"] == min(exact["kl_qp"], exact["kl_pq"]) <= sampled["gap"]


def test_a_higher_level_is_wider(one_lm: LanguageModel) -> None:
    low, high = (off(one_lm).diagnose(ROW, limit=0, level=x).reports[0] for x in (0.8, 0.999))
    for k in ENDS:
        assert high[f"{k}_low"] <= low[f"{k}_low"] <= low[f"{k}_high"] < high[f"{k}_high"]
    assert (low["level"], high["level"]) == (0.8, 0.999)


def test_the_table_is_for_people(one_lm: LanguageModel) -> None:
    exact = off(one_lm, 1.2).diagnose([ROW, {"x": "a"}])
    table, legend = str(exact).split("\n\n")
    head, _, *lines = table.splitlines()
    assert len(lines) == 2
    assert "verdict" in head
    assert max(map(len, str(exact).splitlines())) <= 130
    assert "use with correction (sir)" in lines[0]
    assert f"{exact.reports[0]['kl_pq']:.3g}" in lines[0].split()
    assert "nats" in legend
    assert "0.99" in legend
    assert "256 samples" in legend
    assert "unseen" not in legend, "nothing is unseen where everything was listed"
    sampled = off(one_lm, 1.2).diagnose(ROW, limit=0)
    r = sampled.reports[0]
    assert f"{r['kl_qp_low']:.3g} .. {r['kl_qp_high']:.3g}".replace("0.0 ", "0 ") in str(sampled)
    assert "unseen" in str(sampled)
    unknown = str(Diagnosis([{**r, "gap": math.inf, "kl_qp_high": math.inf, "kl_qp_low": 0.5}]))
    assert "0.5 .. ?" in unknown


def test_reports_are_json(one_lm: LanguageModel) -> None:
    reports = perfect(one_lm).diagnose(ROW).reports
    assert json.loads(json.dumps(finite(reports)))[0]["verdict"] == TRUST


def test_bad_input(one_lm: LanguageModel) -> None:
    posterior = perfect(one_lm)
    with pytest.raises(DataError, match="one list per row"):
        posterior.diagnose([ROW, ROW], gold=[[]])
    with pytest.raises(ConfigError, match="level must lie between 0 and 1"):
        posterior.diagnose(ROW, level=1.5)
