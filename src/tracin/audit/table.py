"""The table of an audit: a record per training row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor

from tracin.audit.parts import Findings, ranks_of
from tracin.errors import MissingExtraError

__all__ = ["COLUMNS", "pandas", "records"]

COLUMNS = (
    "row",
    "given_label",
    "suggested_label",
    "score",
    "is_issue",
    "rank",
    "self_influence",
    "self_influence_rank",
    "loss",
    "mean_loss",
    "residual",
    "margin",
    "aum",
    "neighbour_agreement",
    "doubt",
    "proponent_agreement",
    "proponents",
    "opponents",
    "duplicates",
    "opposes_validation",
)
"""The columns in their order; those that a task has no values for are left out."""

_BOTH = ("proponents", "opponents")


def columns_of(findings: Findings) -> list[str]:
    """The columns that there are values for."""
    there = {"row", "score", "is_issue", "rank", *findings.signals}
    there |= {"self_influence_rank"} if "self_influence" in findings.signals else set()
    there |= {"given_label"} if findings.given_labels is not None else set()
    there |= {"suggested_label"} if findings.suggested_labels is not None else set()
    there |= set(_BOTH) if findings.evidence is not None else set()
    there |= {"duplicates"} if findings.duplicates is not None else set()
    return [name for name in COLUMNS if name in there]


def records(findings: Findings, rows: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Rows of the table as Python values: numbers, names, tuples of row ids, None.

    Args:
        findings: The audit.
        rows: Which rows, in this order; all unless given.

    Returns:
        A record per row, each with the same columns.
    """
    chosen = list(range(len(findings)) if rows is None else rows)
    columns = {name: _column(findings, name, chosen) for name in columns_of(findings)}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _column(findings: Findings, name: str, rows: list[int]) -> list[Any]:
    """A column's values at some rows."""
    if name == "row":
        return rows
    if name in _BOTH:
        return _evidence(findings, _BOTH.index(name), rows)
    if name == "duplicates":
        return [() if findings.duplicates is None else findings.duplicates.of(row) for row in rows]
    values = _values(findings, name)[rows].tolist()
    if name in {"given_label", "suggested_label"} and findings.classes is not None:
        known = {label: findings.label_name(label) for label in set(values)}
        return [known[label] for label in values]
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


def _evidence(findings: Findings, side: int, rows: list[int]) -> list[Any]:
    found = [None if findings.evidence is None else findings.evidence.of(row) for row in rows]
    return [None if both is None else tuple(other for other, _ in both[side]) for both in found]


def _values(findings: Findings, name: str) -> Tensor:
    own = {
        "score": findings.score,
        "is_issue": findings.is_issue,
        "rank": findings.rank,
        "given_label": findings.given_labels,
        "suggested_label": findings.suggested_labels,
    }
    if name == "self_influence_rank":
        return ranks_of(findings.signals["self_influence"])
    found = own[name] if name in own else findings.signals[name]
    assert found is not None
    return found


def pandas(findings: Findings) -> Any:
    """The table as a ``pandas.DataFrame`` whose index is the row.

    Args:
        findings: The audit.

    Returns:
        The frame.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        pd = import_module("pandas")
    except ImportError as cause:
        raise MissingExtraError("Audit.table needs pandas: pip install 'tracin[eval]'") from cause
    table = records(findings)
    frame = pd.DataFrame(table, columns=columns_of(findings))
    index = pd.Index(range(len(findings)), name=None)
    return frame.set_index(index)
