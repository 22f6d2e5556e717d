"""The report: one HTML file with everything in it, to open from disk, send by mail, or keep.

It needs no network, no script and no other file, reads in light and dark and on a phone, and every text
that came from data is escaped.
"""

from tracin.plots.cards import Card, Explanation, Gallery, LossPath
from tracin.report.data import Check, Fact, ReportData
from tracin.report.page import render_report, write_report

__all__ = [
    "Card",
    "Check",
    "Explanation",
    "Fact",
    "Gallery",
    "LossPath",
    "ReportData",
    "render_report",
    "write_report",
]
