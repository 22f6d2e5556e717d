"""An entry of the log of decisions, and what is read as one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import torch

from tracin.audit import Audit
from tracin.audit.decisions import ACTIONS
from tracin.audit.names import unique_names
from tracin.errors import OptionError

__all__ = ["ACTIONS", "UNDO", "Decision", "Labels", "entry_of", "json_of", "rows_digest", "short"]

UNDO = "undo"


@dataclass(frozen=True)
class Decision:
    """An entry of the log.

    Args:
        seq: Its place in the log, from 1.
        id: What the client calls it.
        at: When, in UTC.
        row: The training row.
        action: ``keep``, ``relabel``, ``remove``, or ``undo``.
        label: With ``relabel``: the class by name, or the target.
        undoes: With ``undo``: the entry that is undone.
    """

    seq: int
    id: str
    at: str
    row: int
    action: str
    label: str | float | None = None
    undoes: int | None = None

    def told(self) -> dict[str, Any]:
        """What the page reads: ``{action, label, seq, at}``."""
        return {"action": self.action, "label": self.label, "seq": self.seq, "at": self.at}


@dataclass(frozen=True)
class Labels:
    """What a row can be relabelled to.

    Args:
        names: A name per class; None for targets.
        dtype: Of the labels of the training rows; None where the task has none.
    """

    names: tuple[str, ...] | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, audit: Audit, names: tuple[str, ...] | None = None) -> Labels:
        """The labels of an audit.

        Args:
            audit: The audit.
            names: A name per class, as the pages show them; those of the audit unless given.

        Returns:
            What its rows can be relabelled to.
        """
        if names is None and audit.classes is not None:
            names = unique_names([str(audit.label_name(number)) for number in range(audit.classes)])
        held = audit.given_labels if audit.labels is None else audit.labels
        return cls(names, None if audit.given_labels is None or held is None else held.dtype)

    @property
    def tag(self) -> str | None:
        """A short name of the classes and their order; None for targets."""
        if self.names is None:
            return None
        return blake2b(json.dumps(self.names).encode("ascii"), digest_size=12).hexdigest()

    def checked(self, label: Any) -> str | float:
        """A label that exists.

        Args:
            label: A class by its name, or a target.

        Returns:
            The name, or the target.

        Raises:
            OptionError: There is no such class, the target is not finite or does not fit the dtype of the targets, or the
                task has no labels.
        """
        if self.dtype is None:
            raise OptionError("the task has no labels that could be changed. Choose keep or remove.")
        if self.names is None:
            return _target(label, self.dtype)
        if not isinstance(label, str) or label not in self.names:
            raise OptionError(
                f"label {short(label)} is no class. Choose one of {', '.join(self.names[:20])}."
            )
        return label


def _target(label: Any, dtype: torch.dtype) -> float:
    if not isinstance(label, int | float) or isinstance(label, bool):
        raise OptionError(f"label is {short(label)}: give the new target, a number.")
    try:
        target = float(label)
    except OverflowError:
        target = math.inf
    narrow = torch.tensor(target, dtype=torch.float64).to(torch.float32)
    if not bool(torch.isfinite(narrow)):
        raise OptionError(f"label is {short(label)}: give a finite number that fits float32.")
    if not dtype.is_floating_point and torch.tensor(target, dtype=torch.float64).to(dtype).item() != target:
        raise OptionError(
            f"label is {short(label)}: the targets are {str(dtype).removeprefix('torch.')}. Give a whole number that fits."
        )
    if dtype.is_floating_point and abs(target) > torch.finfo(dtype).max:
        raise OptionError(
            f"label is {short(label)}: the targets are {str(dtype).removeprefix('torch.')}. Give less."
        )
    return target


def rows_digest(audit: Audit) -> str:
    """A short name of the rows that decisions are on: their number and given labels.

    Args:
        audit: The audit.

    Returns:
        Hexadecimal digits.
    """
    labels = b"" if audit.given_labels is None else audit.given_labels.numpy().tobytes()
    return blake2b(labels, digest_size=12, salt=b"tracin rows").hexdigest() + f"-{len(audit)}"


def short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def json_of(line: bytes) -> Any:
    """A line of JSON in UTF-8, without the numbers that JSON has not.

    Args:
        line: The line.

    Returns:
        What it says.

    Raises:
        ValueError: It is none.

    Example:
        >>> json_of(b'{"seq": 1}')
        {'seq': 1}
    """
    try:
        return json.loads(line, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg[:1].lower()}{error.msg[1:]}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number of 64 bits")
    return value


_TYPES = {"seq": int, "id": str, "at": str, "row": int, "action": str, "undoes": int}
_NEEDED = ("seq", "id", "at", "row", "action")


def entry_of(record: Any, rows: int, labels: Labels) -> Decision:
    """An entry from a line of the log.

    Args:
        record: What the line says.
        rows: How many rows there are.
        labels: The labels that there are.

    Returns:
        The entry.

    Raises:
        ValueError: It is no decision on these rows.
    """
    _check_fields(record)
    action, row, label = record["action"], record["row"], record.get("label")
    if action not in (*ACTIONS, UNDO):
        raise ValueError(f"there is no action {short(action)}")
    if not 0 <= row < rows:
        raise ValueError(f"row {short(row)} does not exist: the {rows:,} rows count from 0")
    if ("undoes" in record) != (action == UNDO):
        raise ValueError(f"{action} {'needs' if action == UNDO else 'takes no'} undoes")
    if action == "relabel":
        label = labels.checked(label)
    elif label is not None:
        raise ValueError(f"{action} takes no label")
    return Decision(**{**record, "label": label})


def _check_fields(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004  it was read, not given
    known = [field.name for field in fields(Decision)]
    for name in record:
        if name not in known:
            raise ValueError(f"there is no field {short(name)}")
    for name in _NEEDED:
        if name not in record:
            raise ValueError(f"{name} is missing")
    for name, kind in _TYPES.items():
        value = record.get(name)
        if name in record and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name} is {short(value)}, and no {'text' if kind is str else 'whole number'}")
