"""What a request asks for, read from its address and held to what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracin.errors import OptionError

__all__ = ["MOST", "SuspectFilter", "TestFilter", "choice", "natural", "real"]

MOST = 500
"""The most items of one answer."""

_FURTHEST = 10**12
_LONGEST = 500


def natural(asked: Mapping[str, str], name: str, default: int, lowest: int, highest: int) -> int:
    """A whole number of a request.

    Args:
        asked: The request's parameters.
        name: Which.
        default: Where it is not given.
        lowest: The least that is allowed.
        highest: The most.

    Returns:
        The number.

    Raises:
        OptionError: It is none, or out of range.

    Example:
        >>> natural({"limit": "20"}, "limit", 60, 1, 500)
        20
    """
    text = asked.get(name, "")
    if not text:
        return default
    good = text.isascii() and text.isdigit() and len(text) < 16
    if not good or not lowest <= int(text) <= highest:
        raise OptionError(f"{name} is {text[:40]!r}: give a whole number from {lowest} to {highest}.")
    return int(text)


def real(asked: Mapping[str, str], name: str, default: float) -> float:
    """A number of a request; see ``natural``."""
    text = asked.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"{name} is {text[:40]!r}: give a number.")
    return value


def choice(asked: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of some words, the first unless given; see ``natural``."""
    text = asked.get(name, "") or choices[0]
    if text not in choices:
        raise OptionError(f"{name} is {text[:40]!r}: choose one of {', '.join(choices)}.")
    return text


def _word(asked: Mapping[str, str], name: str) -> str | None:
    """A text; None where it is not given. A class can have an empty name."""
    text = asked.get(name)
    if text is not None and len(text) > _LONGEST:
        raise OptionError(f"{name} has {len(text)} characters: give {_LONGEST} at the most.")
    return text


def _page(asked: Mapping[str, str]) -> dict[str, Any]:
    return {
        "offset": natural(asked, "offset", 0, 0, _FURTHEST),
        "limit": natural(asked, "limit", 60, 1, MOST),
    }


@dataclass(frozen=True)
class TestFilter:
    """Which test rows, in which order.

    Args:
        show: ``all``, ``wrong`` or ``right`` predictions.
        label: Rows of this class, by name.
        predicted: Rows predicted as this class.
        least: The least confidence.
        most: The highest confidence.
        search: Words that a row must hold: its number, its classes, or its text.
        order: ``row``, ``confidence`` or ``loss``.
        down: The largest first.
        offset: Rows to leave out at the beginning.
        limit: Rows of the page.
    """

    show: str = "all"
    label: str | None = None
    predicted: str | None = None
    least: float = 0.0
    most: float = 1.0
    search: str | None = None
    order: str = "row"
    down: bool = False
    offset: int = 0
    limit: int = 60

    __test__ = False  # no test, though pytest would take it for one

    @classmethod
    def of(cls, asked: Mapping[str, str]) -> TestFilter:
        """From a request's parameters.

        Args:
            asked: Parameters by name.

        Returns:
            The filter.

        Raises:
            OptionError: A parameter out of range.
        """
        return cls(
            show=choice(asked, "show", ("all", "wrong", "right")),
            label=_word(asked, "label"),
            predicted=_word(asked, "predicted"),
            least=real(asked, "min", 0.0),
            most=real(asked, "max", 1.0),
            search=_word(asked, "search") or None,
            order=choice(asked, "order", ("row", "confidence", "loss")),
            down=choice(asked, "down", ("0", "1")) == "1",
            **_page(asked),
        )


@dataclass(frozen=True)
class SuspectFilter:
    """Which rows of the audit.

    Args:
        show: ``flagged``, ``all``, ``undecided`` (of the flagged ones) or ``decided``.
        given: Rows of this given class, by name.
        suggested: Rows of this suggested class.
        offset: Rows to leave out at the beginning.
        limit: Rows of the page.
    """

    show: str = "flagged"
    given: str | None = None
    suggested: str | None = None
    offset: int = 0
    limit: int = 60

    @classmethod
    def of(cls, asked: Mapping[str, str]) -> SuspectFilter:
        """From a request's parameters.

        Args:
            asked: Parameters by name.

        Returns:
            The filter.

        Raises:
            OptionError: A parameter out of range.
        """
        return cls(
            show=choice(asked, "show", ("flagged", "all", "undecided", "decided")),
            given=_word(asked, "given"),
            suggested=_word(asked, "suggested"),
            **_page(asked),
        )
