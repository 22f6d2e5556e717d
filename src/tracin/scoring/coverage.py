"""Which parameters were traced, by which route, and which were not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tracin.gradients.sites import Wiring
from tracin.results.saving import import_pandas
from tracin.tasks import Selection

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = Any

__all__ = ["Coverage", "CoverageRow", "coverage_of"]


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: its entries, whether it was traced, its route, and why the route is not the fast one."""

    parameter: str
    shape: tuple[int, ...]
    entries: int
    traced: bool
    route: str
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """The parameters by route. ``fraction`` is the share of the model's entries that were traced."""

    table: tuple[CoverageRow, ...]

    @property
    def fraction(self) -> float:
        """Traced entries / all entries of the model's parameters."""
        total = sum(row.entries for row in self.table)
        return sum(row.entries for row in self.table if row.traced) / total if total else 0.0

    def by_route(self) -> dict[str, int]:
        """Entries by route, largest first."""
        counts: dict[str, int] = {}
        for row in self.table:
            counts[row.route] = counts.get(row.route, 0) + row.entries
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def to_pandas(self) -> DataFrame:
        """The table as a data frame, one row per parameter.

        Returns:
            The data frame.
        """
        return import_pandas().DataFrame([vars(row) for row in self.table])

    def __str__(self) -> str:
        parts = [f"{route} {entries:,}" for route, entries in self.by_route().items()]
        return f"{self.fraction:.1%} of {sum(r.entries for r in self.table):,} parameters traced: {', '.join(parts)}"


def coverage_of(
    selection: Selection, wiring: Wiring, irregular: Mapping[str, Collection[int]] | None = None
) -> Coverage:
    """The coverage of a run.

    Args:
        selection: The parameters by what happens to them.
        wiring: Their routes.
        irregular: Rows that a parameter went one by one for, where the batch used it unlike the probe.

    Returns:
        The coverage; tied parameters once.
    """
    rows = []
    entries: list[tuple[str, torch.Tensor, bool, str, str]] = []
    for name, parameter in selection.traced.items():
        route = wiring.route(name)
        reason = wiring.reasons.get(name, "")
        if irregular and irregular.get(name):
            reason = f"{reason}; {len(irregular[name])} rows went one by one".lstrip("; ")
        entries.append((name, parameter, route != "unused", route, reason))
    entries += [(name, p, False, "frozen", "requires_grad is False") for name, p in selection.frozen.items()]
    entries += [
        (name, p, False, "excluded", "no glob of the task matches") for name, p in selection.excluded.items()
    ]
    for name, parameter, traced, route, reason in entries:
        rows.append(CoverageRow(name, tuple(parameter.shape), parameter.numel(), traced, route, reason))
    return Coverage(tuple(rows))
