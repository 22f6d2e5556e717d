"""What the allocator counts, and what it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from tracin.scoring.memory import Resident, size_text, watched

BATCHES = """
import resource, sys, torch
from contextlib import nullcontext
from tracin.scoring.memory import freed_memory_kept

def batches(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        held = [torch.ones(1 << 20) for _ in range(40)]  # 160 MiB in pieces, freed together
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

batches(3)
plain, level = batches(5), resident()
with freed_memory_kept():
    with freed_memory_kept():
        batches(3)
    kept, held = batches(5), resident() - level
print(plain, kept, held, resident() - level)
"""
PAGES, HELD = 5 * (160 << 20) // 4096, 160 << 20


def _batches(**more: str) -> tuple[int, ...]:
    """Pages made anew for five batches, as it is and kept; bytes held within the block and after it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True, env=own | more
    )
    return tuple(map(int, done.stdout.split()))


glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="the rule is that of glibc's allocator",
)


@glibc
def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    for _ in range(8):  # where the heap cannot grow in one piece, nothing is given back
        plain, kept, held, after = _batches()
        if plain > PAGES / 2:
            break
    else:
        pytest.skip("this system's heap gives nothing back, so there is nothing to gain")
    assert kept < PAGES / 20
    assert held > 0.9 * HELD
    assert after < HELD / 2  # 64 MiB at the most, and what the libraries took


@glibc
def test_limits_of_the_environment_are_left_alone() -> None:
    for limits in (
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"},
    ):
        plain, kept, *_ = _batches(**limits)
        if plain < PAGES / 2:
            pytest.skip("this system's heap gives nothing back")
        assert kept > PAGES / 2


def test_the_watched_peak_is_that_of_the_tensors() -> None:
    with watched(torch.device("cpu")) as found:
        first = torch.zeros(1 << 20)
        second = first + 1
        del first
        kept = second.clone()
        del second
    assert abs(found.peak - 2 * (4 << 20)) < 4096
    assert abs(found.kept - (4 << 20)) < 4096
    assert len(kept) == 1 << 20


def test_growth_is_that_of_the_process() -> None:
    resident = Resident()
    if not resident.tells:
        pytest.skip("the kernel does not tell the size of a process here")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    resident.look()
    grown = resident.growth
    assert grown > 48 << 20
    del held
    resident.look()
    assert resident.growth == grown, "the largest growth counts"


def test_sizes_in_words() -> None:
    assert [size_text(size) for size in (5 << 10, 1 << 30, 25 << 30)] == ["5.0 KiB", "1.0 GiB", "25 GiB"]
