"""What is posted, held to its form."""

from __future__ import annotations

from typing import Any

from tracin.errors import OptionError
from tracin.explorer.decisions import OtherLogError
from tracin.explorer.entries import ACTIONS, Labels
from tracin.explorer.entries import short as _short

__all__ = ["decision_of", "undo_of"]

LONGEST_ID = 100


def decision_of(
    posted: Any, log: str, n: int, labels: Labels
) -> tuple[str, int, str, str | float | None, int | None]:
    """A decision.

    Args:
        posted: ``{log, id, row, action, label, seen}``.
        log: The identity of the log that is served.
        n: How many rows there are.
        labels: The labels that there are.

    Returns:
        Its parts.

    Raises:
        OptionError: It has another form, or names what there is not; ``OtherLogError`` where it is for another log.
    """
    posted = _object(posted, log)
    row = posted.get("row")
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
    label = labels.checked(posted.get("label")) if action == "relabel" else None
    if action != "relabel" and posted.get("label") is not None:
        raise OptionError(f"{action} takes no label. Relabel does.")
    return _id(posted), row, action, label, seen


def undo_of(posted: Any, log: str) -> tuple[str, int]:
    """What to undo.

    Args:
        posted: ``{log, id, seq}``.
        log: The identity of the log that is served.

    Returns:
        ``id`` and ``seq``.

    Raises:
        OptionError: It has another form; ``OtherLogError`` where it is for another log.
    """
    posted = _object(posted, log)
    seq = posted.get("seq")
    if not _whole(seq):
        raise OptionError(f"seq is {_short(seq)}: give the seq of the decision to undo.")
    return _id(posted), seq


def _object(posted: Any, log: str) -> dict[str, Any]:
    """What was posted for this log: a tab may still be open of a study that was served at this address before."""
    if not isinstance(posted, dict):
        raise OptionError("send a JSON object.")
    told = posted.get("log")
    if not isinstance(told, str):
        raise OptionError(f"log is {_short(told)}: give the log that /api/study names. Load the page anew.")
    if told != log:
        raise OtherLogError(log)
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
