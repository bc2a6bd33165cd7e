"""The report in a real browser: every chart is drawn, every text readable, on a phone and in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import LEAST_CONTRAST, browser, needs_chromium, open_page
from trainers import ROWS, make_trainer

from amortlm import LanguageModel, Support
from amortlm.report import measure, write_report

DRAWN = """() => [...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height, svg.querySelectorAll("path, use").length];
})"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@needs_chromium
@pytest.mark.slow
def test_a_report_in_a_browser(one_lm: LanguageModel, tmp_path: Path) -> None:
    for name, rate in (("one", 0.01), ("two", 0.03)):
        small = Support(stop=".", max_tokens=2)  # quickly enumerated
        settings = {"rows": ROWS[:2], "diagnose_steps": 2, "learning_rate": rate, "support": small}
        trainer = make_trainer(one_lm, tmp_path / name, **settings)
        trainer.train()
    measure(trainer.posterior, tmp_path / "two", 64)
    path = write_report([tmp_path / "one", tmp_path / "two"])
    with browser() as chromium:
        for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light")):
            page, complaints = open_page(chromium, path.as_uri(), width, scheme)
            assert complaints == []
            charts = page.evaluate(DRAWN)
            assert len(charts) >= 7 + 1 + 2 * 2
            assert all(w >= 200 and h >= 80 and paths > 5 for w, h, paths in charts)
            assert page.evaluate(LEAST_CONTRAST) > 4.5
            assert page.evaluate(WIDER) == 0, "nothing to scroll to the side"
            assert page.locator("#verdict strong").count() == 2
        page.evaluate("document.body.style.color = 'rgb(240, 240, 240)'")  # the control
        assert page.evaluate(LEAST_CONTRAST) < 1.5
