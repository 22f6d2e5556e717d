"""The time that a study has left, from the passes over the rows that it has done and has to do."""

from __future__ import annotations

import time

__all__ = ["Clock", "span"]

_TRUST = 10.0
"""The first guess counts as so many passes."""

_OVER = 1e-6


def span(seconds: float) -> str:
    """A length of time: ``40 s``, ``12 min``, ``3 h 05 min``.

    Args:
        seconds: How long.

    Returns:
        Words.

    Example:
        >>> span(40.2), span(700.0), span(11100.0)
        ('40 s', '12 min', '3 h 05 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Clock:
    """Counts work in passes of training; what a pass takes is learned as the work goes on.

    Args:
        total: Passes to do.
        seconds_per_pass: A first guess, if there is one.
    """

    def __init__(self, total: float, seconds_per_pass: float | None) -> None:
        self.left, self._done = total, 0.0
        self._guess, self._start = seconds_per_pass, time.monotonic()

    def did(self, passes: float) -> None:
        """So many passes are done."""
        self._done += passes
        self.left = max(self.left - passes, 0.0)

    def skip(self, passes: float) -> None:
        """So many passes need not be done."""
        self.left = max(self.left - passes, 0.0)

    def seconds_left(self) -> float | None:
        """None where nothing is known yet."""
        taken, done = time.monotonic() - self._start, self._done
        if self._guess is not None:
            taken, done = taken + _TRUST * self._guess, done + _TRUST
        return taken / done * self.left if done > 0.0 else None

    def told(self) -> str:
        """``about 12 min left``, or nothing."""
        left = self.seconds_left()
        return "" if left is None or self.left < _OVER else f"; about {span(max(left, 1.0))} left"
