"""Why to believe the numbers: coverage, the check against autograd, the calibration, and what it all cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tracin.audit import Audit
from tracin.explorer.numbers import number
from tracin.scoring.plan import Plan
from tracin.scoring.verification import Verification

__all__ = ["audit_trust", "peak_bytes", "trust_of"]


def peak_bytes() -> int | None:
    """The most memory that this process has held at a time, where the system tells."""
    try:
        resource = import_module("resource")
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def audit_trust(audit: Audit) -> dict[str, Any]:
    """What an audit alone tells: its calibration and its notes."""
    return {
        "coverage": None,
        "verification": None,
        "calibration": _calibration(audit),
        "cutoff": {
            "score": number(audit.cutoff.score),
            "why": audit.cutoff.why,
            "expected_precision": number(audit.cutoff.expected_precision),
        },
        "cost": None,
        "notes": list(audit.notes),
    }


def _calibration(audit: Audit) -> dict[str, Any] | None:
    found = audit.calibration
    if found is None:
        return None
    return {
        "score": [number(value) for value in found.thresholds],
        "precision": [number(value) for value in found.precision],
        "found": [number(value) for value in found.found],
        "flagged": [number(value) for value in found.flagged],
        "cutoff": number(audit.cutoff.score),
        "why": audit.cutoff.why,
    }


def trust_of(
    audit: Audit, verification: Verification, seconds: Mapping[str, float], plan: Plan
) -> dict[str, Any]:
    """The page of that name.

    Args:
        audit: The audit.
        verification: The check against autograd.
        seconds: Of each stage of the preparation.
        plan: Of explaining one row.

    Returns:
        ``{coverage, verification, calibration, cutoff, cost, notes}``.
    """
    coverage = verification.coverage
    return {
        **audit_trust(audit),
        "coverage": {
            "fraction": number(coverage.fraction),
            "routes": coverage.by_route(),
            "table": [{**vars(row), "shape": list(row.shape)} for row in coverage.table],
        },
        "verification": {
            "max_relative_error": number(verification.max_relative_error),
            "tolerance": number(verification.tolerance),
            "exact": verification.exact,
            "rows": len(verification.rows),
            "checkpoints": verification.checkpoints,
            "precision": verification.precision,
        },
        "cost": {
            "peak_bytes": peak_bytes(),
            "seconds": number(sum(seconds.values())),
            "stages": [{"name": name, "seconds": number(value)} for name, value in seconds.items()],
            "explain": {"seconds": number(plan.seconds), "peak_bytes": plan.peak_bytes},
        },
    }
