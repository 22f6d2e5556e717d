"""How far a run is: a bar with the time left on a terminal, plain lines elsewhere, nothing when turned off."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Progress", "progress"]

# Seconds between two plain lines.
EVERY = 10.0


class Progress:
    """Counts finished rows of a run; the base class says nothing."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, rows: int) -> None:
        """Report that so many more rows are done."""
        self.done += rows

    def grow(self, rows: int) -> None:
        """Report that the run has so many more rows to do than was known."""
        self.total += rows


class _Lines(Progress):
    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        super().__init__(total)
        self._label, self._stream = label, stream
        self._start = self._last = time.monotonic()

    def advance(self, rows: int) -> None:
        super().advance(rows)
        now = time.monotonic()
        if now - self._last >= EVERY and self.done < self.total:
            self._last = now
            left = (now - self._start) / self.done * (self.total - self.done)
            print(
                f"{self._label}: {self.done / self.total:.0%}, {_span(left)} left",
                file=self._stream,
                flush=True,
            )


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def progress(label: str, total: int, *, show: bool) -> Iterator[Progress]:
    """Follow a run of ``total`` rows on the standard error stream.

    Args:
        label: What runs, such as ``"influence"``.
        total: Rows to do, over all passes.
        show: False says nothing.

    Yields:
        The counter to advance.
    """
    if not show:
        yield Progress(total)
        return
    if not sys.stderr.isatty():
        yield _Lines(label, total, sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)

        class Bar(Progress):
            def advance(self, rows: int) -> None:
                super().advance(rows)
                bars.update(task, completed=self.done, total=self.total)

        yield Bar(total)
