"""What the allocator counts, and what it keeps; memory as people write it."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracin.errors import OptionError
from tracin.scoring import memory
from tracin.scoring.memory import Resident, freed_memory_kept, parse_memory, size_text, watched

BATCHES = """
import resource, torch
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


def _batches() -> tuple[int, ...]:
    """Pages made anew for five batches, as it is and kept; bytes held within the block and after it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True, env=own
    )
    plain, kept, held, after = map(int, done.stdout.split())
    return plain, kept, held, after


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="the rule is that of glibc's allocator",
)
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("MALLOC_MMAP_MAX_", "0"),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7:glibc.malloc.top_pad=4096"),
    ],
)
def test_limits_of_the_environment_are_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in [key for key in os.environ if key.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(other)
    called: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *limit: called.append(limit), gnu_get_libc_version=None)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # no limit of the heap's
    with freed_memory_kept():
        assert called
    called.clear()
    monkeypatch.setenv(name, value)
    with freed_memory_kept():
        pass
    assert not called


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
    gc.collect()  # what tests before left in cycles would be given back in between, and hide the growth
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


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1, 1),
        (12345, 12345),
        ("12345", 12345),
        ("12b", 12),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        ("3k", 3072),
        ("3KiB", 3072),
        ("1TB", 10**12),
        ("0.5TiB", 1 << 39),
        ("1e3kB", 1_000_000),
    ],
)
def test_memory(written: Any, expected: int) -> None:
    assert parse_memory(written) == expected


@pytest.mark.parametrize(
    "written",
    ["", "GiB", "much", "-1GiB", "0", 0, -5, "1 PiB", "1.2.3GB", "infGB", "nan", True, "2 GB extra"],
)
def test_memory_that_cannot_be_read(written: Any) -> None:
    with pytest.raises(OptionError, match=r"memory is .*'2GiB'"):
        parse_memory(written)


@given(amount=st.integers(1, 10**6), unit=st.sampled_from(["", "b", "kb", "kib", "mb", "mib", "gb", "gib"]))
def test_memory_of_any_size(amount: int, unit: str) -> None:
    base = 1024 if "ib" in unit else 1000
    assert parse_memory(f"{amount}{unit}") == amount * base ** " kmg".index(
        (unit or "b")[0].replace("b", " ")
    )
