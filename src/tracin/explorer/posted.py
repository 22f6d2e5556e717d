"""What is posted, held to its form."""

from __future__ import annotations

import math
from typing import Any

from tracin.errors import OptionError
from tracin.explorer.decisions import ACTIONS
from tracin.explorer.pages import Content

__all__ = ["decision_of", "undo_of"]

LONGEST_ID = 100


def decision_of(posted: Any, content: Content) -> tuple[str, int, str, str | float | None, int | None]:
    """A decision.

    Args:
        posted: ``{id, row, action, label, seen}``.
        content: The rows and classes that there are.

    Returns:
        Its parts.

    Raises:
        OptionError: It has another form, or names what there is not.
    """
    posted = _object(posted)
    row, n = posted.get("row"), len(content.audit)
    if not _whole(row) or not 0 <= row < n:
        raise OptionError(f"row {_short(row)} does not exist: the {n:,} rows count from 0 to {n - 1:,}.")
    action = posted.get("action")
    if action not in ACTIONS:
        raise OptionError(f"the action is {_short(action)}. Choose one of {', '.join(ACTIONS)}.")
    seen = posted.get("seen")
    if seen is not None and not _whole(seen):
        raise OptionError(
            f"seen is {_short(seen)}: give the seq of the decision that the page showed, or null."
        )
    label = _label(posted.get("label"), content) if action == "relabel" else None
    if action != "relabel" and posted.get("label") is not None:
        raise OptionError(f"{action} takes no label. Relabel does.")
    return _id(posted), row, action, label, seen


def undo_of(posted: Any) -> tuple[str, int]:
    """What to undo.

    Args:
        posted: ``{id, seq}``.

    Returns:
        Both.

    Raises:
        OptionError: It has another form.
    """
    posted = _object(posted)
    seq = posted.get("seq")
    if not _whole(seq):
        raise OptionError(f"seq is {_short(seq)}: give the seq of the decision to undo.")
    return _id(posted), seq


def _object(posted: Any) -> dict[str, Any]:
    if not isinstance(posted, dict):
        raise OptionError("send a JSON object.")
    return posted


def _id(posted: dict[str, Any]) -> str:
    name = posted.get("id")
    if not isinstance(name, str) or not 8 <= len(name) <= LONGEST_ID:
        raise OptionError(
            f"id is {_short(name)}: give a text of 8 to {LONGEST_ID} characters that is used once, such as a UUID."
        )
    return name


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _label(label: Any, content: Content) -> str | float:
    if content.audit.given_labels is None:
        raise OptionError("the task has no labels that could be changed. Choose keep or remove.")
    if content.names is None:
        if isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label):
            return float(label)
        raise OptionError(f"label is {_short(label)}: give the new target, a number.")
    if label not in content.names:
        raise OptionError(
            f"label {_short(label)} is no class. Choose one of {', '.join(content.names[:20])}."
        )
    return label
