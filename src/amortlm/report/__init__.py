"""The report of a run: one HTML file that needs no network and no model."""

from amortlm.report.measure import is_measured, measure
from amortlm.report.page import write_report

__all__ = ["is_measured", "measure", "write_report"]
