"""Rows read ahead in a thread: the same rows, errors at their place, no thread left, no random state moved.

In a process of its own: beartype, which the tests switch on, draws from the random state of Python, and rows that
draw are read in the caller's thread.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tracin.scoring.order import order_of


def test_reading_ahead() -> None:
    script = Path(__file__).with_name("prefetching.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("decoded", "state", "name", "passes"),
    [(0, 10, "tensors", 0), (200, 10, "kept", 1), (10_000, 10, "tiles", 1), (10_000, 900, "checkpoints", 3)],
)
def test_the_order_makes_rows_as_few_times_as_memory_allows(
    decoded: int, state: int, name: str, passes: int
) -> None:
    found = order_of(decoded=decoded, state=state, held=100, checkpoints=3, memory=1000)
    assert (found.name, found.decoded_passes) == (name, passes)
