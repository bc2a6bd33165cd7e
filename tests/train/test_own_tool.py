"""A tool of the user's own: the run is saved without it, and loads with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Posterior, Support, Tool
from amortlm.errors import ConfigError


class Echo(Tool):
    trigger = "c"

    def write(self, text: str) -> str:
        return " d" if len(text) < 4 else ""


def test_a_run_with_a_tool_of_ones_own(one_lm: LanguageModel, tmp_path: Path) -> None:
    support = Support(stop=".", max_tokens=4, tool=Echo())
    settings = {"objective": "vargrad", "save_strategy": "steps", "save_steps": 2, "diagnose_steps": 2}
    trainer = make_trainer(one_lm, tmp_path, support=support, **settings)
    trainer.train()
    with pytest.raises(ConfigError, match="Echo.*give tool= to from_pretrained"):
        Posterior.from_pretrained(tmp_path, lm=one_lm)
    loaded = Posterior.from_pretrained(tmp_path, lm=one_lm, tool=Echo())
    texts = [sample.text for sample in loaded.sample(ROWS[0], 32)]
    assert texts == [sample.text for sample in trainer.posterior.sample(ROWS[0], 32)]
    assert any("c d" in text for text in texts), "the tool has written"
    completions = [sample.tokens for sample in trainer.posterior.sample(ROWS[0], 8)]
    pair = (posterior.log_prob(ROWS[0], completions) for posterior in (loaded, trainer.posterior))
    assert torch.equal(*pair)
