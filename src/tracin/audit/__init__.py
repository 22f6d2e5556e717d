"""Which labels to look at first, why, and what they should be: the audit of a training set."""

from tracin.audit.calibrating import calibrate
from tracin.audit.decisions import Cleaned, Decision
from tracin.audit.finding import find_label_issues
from tracin.audit.parts import Calibration, Cutoff, Duplicates, Evidence
from tracin.audit.result import Audit

__all__ = [
    "Audit",
    "Calibration",
    "Cleaned",
    "Cutoff",
    "Decision",
    "Duplicates",
    "Evidence",
    "calibrate",
    "find_label_issues",
]
