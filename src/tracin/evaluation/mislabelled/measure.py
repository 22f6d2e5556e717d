"""Seconds and peak memory of a piece of work in this process."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Measured", "measured"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_EVERY = 0.005


@dataclass
class Measured:
    """What a piece of work took.

    Args:
        seconds: Wall-clock time.
        cpu_seconds: Processor time of all threads.
        peak_bytes: The most resident memory while it ran, above what the process held before it began, plus the most
            memory of the GPU above what was held there. None where the system does not tell (outside Linux).
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None

    def after(self, other: Measured, share: float = 1.0) -> Measured:
        """This work and one that it was built on.

        Args:
            other: What the other one took.
            share: The part of it that this work needed.

        Returns:
            The sum of the times, and the higher of the peaks.
        """
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        return Measured(
            self.seconds + share * other.seconds,
            self.cpu_seconds + share * other.cpu_seconds,
            max(peaks) if peaks else None,
        )


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure the block.

    Memory that the allocator kept from earlier work is handed back to the system first, so that it counts again for
    the work that takes it anew. On Linux the kernel then keeps the highest resident size (``VmHWM``, set back through
    ``/proc/self/clear_refs``): no moment is missed. Where that file may not be written, a thread looks every 5 ms.

    Yields:
        Filled in when the block ends.
    """
    found = Measured()
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    _hand_back()
    before = _resident("VmRSS")
    device_before = _gpu_start() if gpu else 0
    kernel = before is not None and _reset_peak()
    watch = None if kernel or before is None else _Watch()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found.seconds, found.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        highest = watch.stop() if watch is not None else _resident("VmHWM") if kernel else None
        if before is not None and highest is not None:
            device = torch.cuda.max_memory_allocated() - device_before if gpu else 0
            found.peak_bytes = max(highest - before, 0) + max(device, 0)


def _gpu_start() -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _hand_back() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _resident(field: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class _Watch(threading.Thread):
    """Looks at the resident size again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over, self._highest = threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self._over.wait(_EVERY):
            self._highest = max(self._highest, _resident("VmRSS") or 0)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return max(self._highest, _resident("VmRSS") or 0)
