"""benchmarks/verdicts.py: its tables are samplers and targets that the diagnosis takes for any other."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.posteriors.laws import Space
from benchmarks.tabulated import TablePolicy, TableTarget
from benchmarks.verdicts import scaled

from amortlm.diagnostics.diagnose import CORRECT, TRUST, diagnose

SPACE = Space(6, 1, 2)


@pytest.mark.parametrize("lost", [False, True])
def test_the_diagnosis_of_tables_trusts_the_posterior_and_nothing_that_lost_a_mode(lost: bool) -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(6 + 36))
    mode = np.arange(len(p)) % 3 == 0
    policy = TablePolicy(SPACE, scaled(p, mode, 1e-3) if lost else p, rng.dirichlet(np.full(len(p), 5.0)))
    found = diagnose(
        policy, TableTarget(SPACE, np.log(p)), [{}], 128, seed=0, limit=0, chains=False, level=0.99
    ).rows[0]
    assert found.verdict.startswith((TRUST, CORRECT)) != lost
    assert found.bounds is not None
    assert 0.0 in found.bounds.log_z  # p sums to one
