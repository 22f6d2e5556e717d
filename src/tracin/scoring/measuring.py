"""What a piece of work costs: its memory by the allocator's count, its time, and what it took of the process beyond that."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tracin.scoring.memory import Resident, Watched, watched

__all__ = ["Cost", "Measuring"]

# Seconds that repeating a batch for its time may take, and how often it is repeated at the most.
PATIENCE, REPEATS = 0.5, 5


@dataclass(frozen=True)
class Cost:
    """A piece of work.

    Attributes:
        peak: Bytes of its tensors at the most, above the level before it.
        kept: Bytes of the tensors that it left.
        seconds: Its time.
        rows: The rows that it did.
    """

    peak: int
    kept: int
    seconds: float
    rows: int = 1

    @property
    def per_row(self) -> float:
        """Seconds of a row."""
        return self.seconds / self.rows


class Measuring:
    """Measures one piece of work after another.

    Args:
        device: Where the tensors are.

    Attributes:
        unexplained: Bytes by which the process grew beyond its tensors, as far as the kernel tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.unexplained = device, 0
        with watched(device):
            pass  # what watching itself takes is not the work's
        self._resident = Resident()

    @property
    def told_by_kernel(self) -> bool:
        """Whether the kernel tells the memory that the tensors are in."""
        return self.device.type == "cpu" and self._resident.tells

    def once(self, work: Callable[[], Any], *, watch: bool = True) -> tuple[Cost, Any]:
        """Work that cannot be repeated, watched and timed at once.

        Args:
            work: The work.
            watch: Whether to follow its tensors.

        Returns:
            The cost, and what the work returned.
        """
        start = time.perf_counter()
        with watched(self.device) if watch else nullcontext(Watched()) as found:
            out = work()
        seconds = time.perf_counter() - start
        self._resident.look()
        return Cost(found.peak, found.kept, seconds), out

    def repeated(self, work: Callable[[], int]) -> Cost:
        """Work that is timed several times, and watched in the end, since watching takes memory and time.

        Args:
            work: The work, which returns how many rows it did.

        Returns:
            The cost.
        """
        rows, times = work(), list[float]()
        while len(times) < REPEATS and sum(times) < PATIENCE:
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        self._resident.look()
        with watched(self.device) as found:
            work()
        return Cost(found.peak, found.kept, median(times), rows)

    def explain(self, *tensors: int) -> None:
        """Note what the process took so far beyond its tensors.

        Args:
            tensors: Bytes that tensors took, at times of their own.
        """
        if self.told_by_kernel:
            self.unexplained = max(self.unexplained, self._resident.growth - max(tensors))
