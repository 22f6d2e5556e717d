"""How much memory a piece of work takes at its most: the allocator's own count, not a guess.

On the CPU PyTorch's profiler tells every allocation and release, whose running sum is followed; an accelerator keeps that
count itself. Allocations that Python or other libraries make are not in it, nor is what C's allocator keeps of freed
blocks: ``Resident`` asks the kernel for that, where it tells.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from tracin.errors import OptionError

__all__ = ["Resident", "Watched", "freed_memory_kept", "parse_memory", "size_text", "watched"]

# Of glibc's malloc.h and its manual: names of limits, the largest block that it takes from the heap, and the size of a freed
# block from which on it looks whether the heap's end should be given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP, _LOOKS_AT_HEAP, _NO_LIMIT = 32 << 20, 128 << 10, 2**31 - 1
# Limits by which, once the environment sets one of them, glibc adapts none by itself.
_LIMITS = ("trim_threshold", "top_pad", "mmap_threshold", "mmap_max")
# An entry for every open ``freed_memory_kept``: the limits belong to the process.
_HOLDING: list[None] = []
_LOCK = threading.Lock()


@dataclass
class Watched:
    """What a block of code allocated: its peak above the level before it, and what it left behind."""

    peak: int = 0
    kept: int = 0


@contextmanager
def watched(device: torch.device) -> Iterator[Watched]:
    """Follow the tensors' memory within the block.

    Args:
        device: Where the tensors are.

    Yields:
        The count, filled in when the block ends without an error.
    """
    found = Watched()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = max(0, torch.cuda.max_memory_allocated(device) - before)
        found.kept = torch.cuda.memory_allocated(device) - before
        return
    profiler: Any = torch.autograd
    options: Any = torch._C
    config = profiler.ProfilerConfig(
        profiler.ProfilerState.CPU,
        False,
        True,
        False,
        False,
        False,
        options._profiler._ExperimentalConfig(),
    )
    # The newer profiler counts the same, and writes lines of its own to standard error.
    profiler._enable_profiler_legacy(config)
    try:
        yield found
    finally:
        threads = profiler._disable_profiler_legacy()
        for events in threads:
            sizes = [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
            found.peak += max(accumulate(sizes, initial=0))
            found.kept += sum(sizes)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, let the process keep what one batch frees for the next one.

    glibc gives the free end of the heap back to the system, at the latest where it is larger than 64 MiB, and the next batch
    has all its pages made anew: `python benchmarks/heap.py` counts them. On leaving the limit is 64 MiB, the largest that
    glibc takes by itself. Nothing happens on other systems, and where the environment sets the limits of malloc.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    with _LOCK:
        _HOLDING.append(None)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT)
    try:
        yield
    finally:
        with _LOCK:
            _HOLDING.pop()
            if not _HOLDING:  # other threads may still be scoring
                mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)
                torch.UntypedStorage(_LOOKS_AT_HEAP, device="cpu")  # given back on freeing this


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function, where it is the system's and the environment leaves its limits alone."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    own = any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables for name in _LIMITS
    )
    if sys.platform != "linux" or own:
        return None
    library = ctypes.CDLL(None)
    return getattr(library, "mallopt", None) if hasattr(library, "gnu_get_libc_version") else None


class Resident:
    """By how much the process grew since this was made, libraries and free pieces between tensors included.

    Linux alone tells; elsewhere it is 0. A process that was larger before is asked for what it holds now, which free pieces
    from before can hide.
    """

    def __init__(self) -> None:
        self._level, self._before = _resident()
        self.growth = 0

    @property
    def tells(self) -> bool:
        """Whether the kernel told anything."""
        return self._level > 0

    def look(self) -> None:
        """Take the growth until now into account."""
        now, peak = _resident()
        reached = peak if peak > self._before else now
        self.growth = max(self.growth, reached - self._level)


def _resident() -> tuple[int, int]:
    """Bytes of the process now, and at its largest so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0, 0
    found = {key: rest for key, _, rest in (line.partition(":") for line in lines)}
    now, peak = (int(found.get(key, "0").split()[0]) << 10 for key in ("VmRSS", "VmHWM"))
    return now, peak


def parse_memory(memory: str | int) -> int:
    """Bytes of ``"2GiB"``, ``"500 MB"`` or a number of bytes.

    Args:
        memory: The amount.

    Returns:
        Bytes.

    Raises:
        OptionError: It cannot be read, or is not positive.

    Example:
        >>> parse_memory("1.5GiB")
        1610612736
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}ib": 1024**power, f"{letter}b": 1000**power, letter: 1024**power}
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    if isinstance(memory, str):
        text = memory.strip().lower().replace(" ", "")
        digits = text.rstrip("bikmgt")
        try:
            amount = float(digits) * units[text[len(digits) :]]
        except (ValueError, KeyError):
            amount = 0.0
        if 0 < amount < float("inf"):
            return int(amount)
    raise OptionError(f"memory is {memory!r}: give bytes or a size such as '2GiB' or '500MB'.")


def size_text(size: int) -> str:
    """Bytes in words.

    Args:
        size: Bytes.

    Returns:
        Such as ``"410 MiB"``.

    Example:
        >>> size_text(430 << 20), size_text(3 << 30), size_text(800)
        ('430 MiB', '3.0 GiB', '800 bytes')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            amount = size / (1 << power)
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:,.0f} {unit}"
    return f"{size} bytes"
