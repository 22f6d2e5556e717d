"""What a report tells, as data: whoever has the results fills these in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tracin.errors import OptionError
from tracin.evaluation import DetectionCurve
from tracin.plots import Card, Explanation

__all__ = ["Check", "Fact", "ReportData"]


@dataclass(frozen=True)
class Fact:
    """A number worth seeing first.

    Args:
        name: What it is, in a few words.
        value: The number as text.
        note: What it is measured against, in a few words.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Check:
    """How much of the model was traced, and how far the numbers lie from autograd's.

    Args:
        coverage: The share of the model's parameters that were traced, from 0 to 1.
        max_relative_error: The largest ‖Δ‖/‖reference‖ over parameters and rows.
        table: One mapping per parameter or layer, with the same keys: shown as a table.
        notes: Sentences on what was left out and why.

    Raises:
        OptionError: A coverage outside [0, 1].
    """

    coverage: float
    max_relative_error: float
    table: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.coverage <= 1.0:
            raise OptionError(f"coverage is a share from 0 to 1, got {self.coverage}")


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything in a report. A section without data is left out.

    Args:
        title: The heading.
        summary: One or two sentences below it.
        facts: Numbers shown beside those that the report reads from the sections.
        check: Coverage and the check against autograd.
        suspects: The training rows to look at first, most suspect first.
        suspects_told: What they are, in a sentence.
        curves: Detection curves by name, the first drawn strongest.
        shares: The shares of data at which the curves are read.
        explanations: Predictions with their proponents and opponents; one with a ``path`` gets the figure
            of its loss along training.
        notes: Sentences to read with the numbers.
        provenance: How the numbers were made, JSON-like.
    """

    title: str
    summary: str = ""
    facts: tuple[Fact, ...] = ()
    check: Check | None = None
    suspects: tuple[Card, ...] = ()
    suspects_told: str = (
        "The training rows that the model had to learn by heart, most self-influential first."
    )
    curves: Mapping[str, DetectionCurve] = field(default_factory=dict)
    shares: tuple[float, ...] = (0.1, 0.2)
    explanations: tuple[Explanation, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
