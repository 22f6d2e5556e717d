"""Decisions on suspects, and the rows and labels that they leave."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from tracin.audit.labels import put, unchangeable
from tracin.audit.parts import Findings
from tracin.errors import OptionError
from tracin.options import whole_number
from tracin.shapes import Int

__all__ = ["ACTIONS", "Cleaned", "Decision", "apply", "checked", "opposing", "suggested"]

Action = Literal["keep", "relabel", "remove"]
ACTIONS: tuple[Action, ...] = ("keep", "relabel", "remove")
KEEP, RELABEL, REMOVE = ACTIONS
_DIGITS = 40


@dataclass(frozen=True)
class Decision:
    """What to do with a row.

    Args:
        row: Its position.
        action: ``"keep"``, ``"relabel"`` or ``"remove"``.
        label: With ``"relabel"``: the class, a text by its name and a number by its number, or the target.
    """

    row: int
    action: str
    label: str | int | float | None = None


@dataclass(frozen=True, eq=False)
class Cleaned:
    """The training set after decisions.

    Args:
        rows: The rows that stay, in ascending order [r].
        labels: Their labels [r, ...], in the dtype and shape that the training rows have them in; class numbers, int64,
            where a loss of one's own does not tell where they are; None where the task tells none: take those of ``rows``.
        removed: The rows that go.
        relabelled: The rows with another label.
        kept: The rows that were looked at and stay as they are.

    Example:
        >>> from tracin.audit import Cleaned
        >>> cleaned = Cleaned(torch.tensor([0, 2]), torch.tensor([1, 0]), removed=(1,), relabelled=(2,), kept=())
        >>> x = torch.zeros(3, 8)
        >>> train = x[cleaned.rows], cleaned.labels
    """

    rows: Int[Tensor, " r"]
    labels: Tensor | None
    removed: tuple[int, ...]
    relabelled: tuple[int, ...]
    kept: tuple[int, ...]


def checked(findings: Findings, decisions: Any) -> list[Decision]:
    """Decisions in ascending order of their rows, each held to what there is.

    Args:
        findings: The audit.
        decisions: A mapping of rows to ``"keep"``, ``"remove"`` or ``("relabel", class)``, or an iterable of
            ``Decision``.

    Returns:
        The decisions, labels as class numbers or targets.

    Raises:
        OptionError: A row that does not exist or is decided twice, an unknown action, or a class that does not exist.
    """
    found: dict[int, Decision] = {}
    for row, action, label in _listed(decisions):
        row = _row(findings, row)
        if row in found:
            raise OptionError(f"row {row} is decided twice: give one decision for a row.")
        if action not in ACTIONS:
            raise OptionError(f"row {row}: the action is {action!r}. Choose one of {', '.join(ACTIONS)}.")
        if (label is not None) != (action == RELABEL):
            more = "needs a label" if action == RELABEL else f"takes no label, got {label!r}"
            raise OptionError(f"row {row}: {action} {more}.")
        found[row] = Decision(row, action, None if action != RELABEL else _label(findings, row, label))
    return [found[row] for row in sorted(found)]


def _listed(decisions: Any) -> list[tuple[Any, Any, Any]]:
    """Row, action and label of each, whatever they are."""
    if isinstance(decisions, Mapping):
        return [_of_pair(row, told) for row, told in decisions.items()]
    if isinstance(decisions, str | bytes) or not hasattr(decisions, "__iter__"):
        raise OptionError(
            f"decisions is a {type(decisions).__name__}: give a mapping {{row: 'keep' | 'remove' | ('relabel', class)}}, or "
            "a list of Decision(row, action, label)."
        )
    listed = list(decisions)
    for one in listed:
        if not isinstance(one, Decision):
            raise OptionError(
                f"decisions holds a {type(one).__name__}, not a Decision(row, action, label). For pairs give a mapping."
            )
    return [(one.row, one.action, one.label) for one in listed]


def _of_pair(row: Any, told: Any) -> tuple[Any, Any, Any]:
    if isinstance(told, Decision):
        if told.row != row:
            raise OptionError(f"decisions[{row!r}] is a decision on row {told.row}.")
        return row, told.action, told.label
    if isinstance(told, str):
        return row, told, None
    if isinstance(told, tuple | list) and len(told) == 2:
        return row, *told
    raise OptionError(f"decisions[{row!r}] is {told!r}: give 'keep', 'remove' or ('relabel', class).")


def _row(findings: Findings, row: Any) -> int:
    n, number = len(findings), _number(row)
    if not 0 <= number < n:
        raise OptionError(f"row {_shown(row)} does not exist: the {n:,} rows count from 0 to {n - 1:,}.")
    return number


def _number(value: Any) -> int:
    """A whole number of any library; −1 for what is none."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1


def _shown(value: Any) -> str:
    """A value in a message; Python refuses to write out numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def _label(findings: Findings, row: int, label: Any) -> int | float:
    if findings.given_labels is None:
        raise OptionError(f"row {row}: the task has no labels that could be changed. Choose keep or remove.")
    if findings.classes is None:
        return _target(row, label)
    names = list(findings.class_names or ())
    if isinstance(label, str) and label in names:
        label = names.index(label)
    number = _number(label)
    if not 0 <= number < findings.classes:
        known = f"{', '.join(names[:20])}, or " if names else ""
        raise OptionError(
            f"row {row}: {_shown(label)} is no class. Give {known}a number from 0 to {findings.classes - 1}."
        )
    return number


def _target(row: int, label: Any) -> float:
    """A finite target."""
    target = math.nan
    if isinstance(label, Real) and not isinstance(label, bool):
        try:
            target = float(label)
        except OverflowError:
            target = math.inf
    if not math.isfinite(target):
        raise OptionError(f"row {row}: the target {_shown(label)} is no finite number of float64. Give one.")
    return target


def apply(findings: Findings, decisions: Any) -> Cleaned:
    """See ``Audit.apply``."""
    found = checked(findings, decisions)
    changed = next((one.row for one in found if one.action == RELABEL), None)
    reason = None if changed is None else unchangeable(findings)
    if reason is not None:
        raise OptionError(f"row {changed}: {reason}")
    held = findings.given_labels if findings.labels is None else findings.labels
    labels = None if held is None else held.clone()
    stays = torch.ones(len(findings), dtype=torch.bool)
    groups: dict[str, list[int]] = {action: [] for action in ACTIONS}
    for decision in found:
        groups[decision.action].append(decision.row)
        if decision.action == REMOVE:
            stays[decision.row] = False
        elif labels is not None and isinstance(decision.label, int | float):
            put(labels, decision.row, float(decision.label), findings.classes)
    return Cleaned(
        rows=stays.nonzero().flatten(),
        labels=None if labels is None else labels[stays],
        removed=tuple(groups[REMOVE]),
        relabelled=tuple(groups[RELABEL]),
        kept=tuple(groups[KEEP]),
    )


def suggested(findings: Findings, k: Any, action: Any) -> tuple[Decision, ...]:
    """See ``Audit.suggested``."""
    flagged = int(findings.is_issue.sum())
    count = flagged if k is None else whole_number(k, "suggested: k", 0, len(findings))
    reason = _no_suggestion(findings)
    if action is None:
        action = RELABEL if findings.classes is not None and reason is None else REMOVE
    if action not in ACTIONS:
        raise OptionError(f"suggested: action is {action!r}. Choose one of {', '.join(ACTIONS)}.")
    if action == RELABEL and reason is not None:
        raise OptionError(f"suggested: {reason}")
    flags = findings.is_issue[findings.order].int()
    rows = findings.order[torch.argsort(flags, descending=True, stable=True)][:count].tolist()
    if action != RELABEL:
        return tuple(Decision(row, action) for row in rows)
    labels = findings.suggested_labels
    assert labels is not None
    return tuple(Decision(row, RELABEL, findings.label_name(labels[row].item())) for row in rows)


def _no_suggestion(findings: Findings) -> str | None:
    """Why ``apply`` could not take the suggested labels."""
    if findings.suggested_labels is None:
        return "there is no suggested label for this task. Choose 'keep' or 'remove'."
    labels = findings.labels
    if findings.classes is None and labels is not None and not labels.is_floating_point():
        return (
            "the targets are whole numbers, and the suggested ones are not. Choose 'keep' or 'remove', or give the training "
            "rows targets of floats."
        )
    return unchangeable(findings)


def opposing(findings: Findings, k: int) -> Int[Tensor, " k"]:
    """See ``Audit.opposing``."""
    values = findings.signals.get("opposes_validation")
    if values is None:
        raise OptionError(
            "opposing: no validation set was given. Call find_label_issues(..., validation=rows)."
        )
    k = whole_number(k, "opposing: k", 1)
    order = torch.argsort(values, descending=True, stable=True)
    return order[values[order] > 0][:k]
