"""Arguments that many functions take, checked in one way."""

from __future__ import annotations

import operator
from typing import Any

from tracin.errors import OptionError

__all__ = ["whole_number"]


def whole_number(value: Any, name: str, lowest: int, highest: int | None = None, *, why: str = "") -> int:
    """The value, if it is a whole number in a range.

    Args:
        value: What the user gave; numbers of other libraries count, ``True`` does not.
        name: What it is called in the message.
        lowest: The smallest that is allowed.
        highest: The largest; None: any.
        why: Added to the message after the range.

    Returns:
        It, as an ``int``.

    Raises:
        OptionError: It is something else.

    Example:
        >>> whole_number(3, "k", 1, 5)
        3
    """
    found = None
    if not isinstance(value, bool):
        try:
            found = operator.index(value)
        except TypeError:
            found = None
    if found is None or found < lowest or (highest is not None and found > highest):
        told = f", at least {lowest}" if highest is None else f" from {lowest} to {highest}"
        raise OptionError(f"{name} is {value!r}: give a whole number{told}{why}.")
    return found
