"""Numbers as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["number"]


def number(value: Any) -> float | None:
    """A number to six digits; None for what is not finite.

    Args:
        value: A number, or None.

    Returns:
        It, rounded.

    Example:
        >>> number(0.12345678), number(float("nan"))
        (0.123457, None)
    """
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
