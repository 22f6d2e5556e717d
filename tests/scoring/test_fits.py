"""A run that cannot fit in ``memory=`` is refused before it computes, and the message says what would fit."""

from __future__ import annotations

import re

import pytest
import torch

from scoring.common import M, N, method, rows
from tracin.errors import MemoryLimitError


def test_scores_that_do_not_fit_are_refused_and_the_mends_fit() -> None:
    many = tuple(torch.cat([part] * 200) for part in rows(M, 2))
    with pytest.raises(MemoryLimitError, match=f"{200 * M:,} queries × {N} train rows") as caught:
        method(memory="40KiB").influence(rows(N, 1), many)
    told = str(caught.value)
    asked = re.search(r"memory='(\w+)'", told)
    assert asked is not None
    assert "at a time" in told
    assert method(memory=asked.group(1)).influence(rows(N, 1), many).values.shape == (200 * M, N)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    large = tuple(torch.cat([part] * 500) for part in rows(N, 1))
    with pytest.raises(MemoryLimitError, match=r"a batch of 5,500 rows") as caught:
        method(memory="100KiB", batch_size=5500).self_influence(large)
    smaller = re.search(r"batch_size=(\d+)", str(caught.value))
    assert smaller is not None
    found = method(memory="100KiB", batch_size=int(smaller.group(1))).self_influence(large)
    assert len(found.values) == 5500


def test_nothing_is_computed_before_the_refusal() -> None:
    calls = []
    chosen = method(memory="4KiB")
    handle = chosen.task.model.register_forward_hook(lambda *_: calls.append(1))
    many = tuple(torch.cat([part] * 200) for part in rows(M, 2))
    with pytest.raises(MemoryLimitError):
        chosen.influence(rows(N, 1), many)
    handle.remove()
    assert len(calls) <= 3, "the probe runs a few rows; a batch or a check would be more"
