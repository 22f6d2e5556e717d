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
from tracin.scoring.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def batches(count):
    for _ in range(count):
        held = [torch.ones(1 << 20) for _ in range(10)]  # 40 MiB in pieces, freed together
        del held

batches(3)
before = faults()
batches(5)
plain = faults() - before
keep_freed_memory()
batches(3)
before = faults()
batches(5)
print(plain, faults() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="the rule is that of glibc's allocator",
)
def test_freed_memory_is_used_again() -> None:
    pages, plain, kept = 5 * (40 << 20) // 4096, 0, 0
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    for _ in range(8):  # where the heap cannot grow in one piece, nothing is given back
        done = subprocess.run(
            [sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True, env=own
        )
        plain, kept = map(int, done.stdout.split())
        if plain > pages / 2:
            break
    else:
        pytest.skip("this system's heap gives nothing back, so there is nothing to gain")
    assert kept < pages / 20


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
