"""Means and metrics for the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from amortlm import importance
from amortlm.lab.experiment import Metric

Figures = dict[str, float]


def average(rows: Sequence[Figures]) -> Figures:
    """Mean of each figure over the rows that have this figure."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean(row[name] for row in rows if name in row) for name in names}


def importance_figures(found: importance.ImportanceEstimate) -> Figures:
    """ESS as a share of the samples, ELBO in nats, variance of log w in nats^2."""
    return {"ESS": found.ess, "ELBO": found.elbo, "var log w": found.log_w_variance}


def metrics(*names: str) -> dict[str, Metric]:
    """Figures shown with three digits under their own names."""
    return {name: Metric(name, ".3g", spread=".2g") for name in names}
