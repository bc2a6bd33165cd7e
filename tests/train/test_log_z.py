"""A learned log Z starts near the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, exact


def test_it_starts_from_an_estimate_of_log_z(one_lm: LanguageModel, tmp_path: Path) -> None:
    """With 4,000 samples of each row within .1 nats of the exact value; the mean of the log weights is further below,
    by KL(q || p)."""
    target = one_lm.log_prob("{z}", given="{x}{y}") / 1.5
    trainer = make_trainer(
        one_lm, tmp_path, rows=ROWS[:2], objective={"tb": {"log_z": "learned"}}, target=target
    )
    assert trainer.log_z is not None
    trainer.log_z.start(trainer.target, 4_000, 1.0, "seed")
    truths = [exact.enumerate_posterior(trainer.target, trainer.policy.support, row) for row in ROWS[:2]]
    torch.testing.assert_close(
        trainer.log_z.values, torch.tensor([t.log_z for t in truths]), atol=0.1, rtol=0
    )
    rollouts, log_q = trainer.policy.sample(ROWS[:2], 4_000, seed="seed")
    log_w = trainer.target.score_final(rollouts) - log_q.final(rollouts.lengths)
    below = torch.tensor([t.log_z for t in truths]) - log_w.view(2, -1).mean(1)
    assert below.min() > 0.1, "more than the tolerance"


def test_it_starts_at_the_temperature_of_the_reward(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, rows=ROWS[:1], objective={"tb": {"log_z": "learned"}})
    assert trainer.log_z is not None
    trainer.log_z.start(trainer.target, 4_000, 2.0, "seed")
    truth = exact.enumerate_posterior(trainer.target / 2, trainer.policy.support, ROWS[0])
    assert trainer.log_z.values[0].item() == pytest.approx(truth.log_z, abs=0.1)
