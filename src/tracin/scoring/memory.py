"""How much memory a piece of work takes at its most: the allocator's own count, not a guess.

On the CPU PyTorch's profiler tells every allocation and release, whose running sum is followed; an accelerator keeps that
count itself. Allocations that Python or other libraries make are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

__all__ = ["Watched", "size_text", "watched"]


# glibc maps larger blocks one by one, and gives them back at once.
PIECE = 32 << 20


@dataclass
class Watched:
    """What a block of code allocated: its peak above the level before it, and what it left behind.

    ``small`` is the peak of what came in pieces below ``PIECE``, which C's allocator cuts from its heap.
    """

    peak: int = 0
    kept: int = 0
    small: int = 0


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
            found.small += max(accumulate((s for s in sizes if abs(s) < PIECE), initial=0))
            found.kept += sum(sizes)


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
