"""Memory is the work's own: what was there before does not count, what was given back counts anew."""

from __future__ import annotations

import time

import pytest
import torch

from tracin.evaluation.mislabelled import measure
from tracin.evaluation.mislabelled.measure import measured

MIB = 2**20
pytestmark = pytest.mark.skipif(measure._resident("VmRSS") is None, reason="the system does not tell memory")


def work(mib):
    block = torch.ones(mib * MIB // 4)
    time.sleep(0.05)  # long enough for the thread that looks
    return float(block[0])


@pytest.mark.parametrize("kernel", [True, False])
def test_the_peak_is_that_of_the_block(monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(measure, "_reset_peak", lambda: False)
    held = torch.ones(64 * MIB // 4)
    for mib in (96, 32, 96):
        with measured() as taken:
            work(mib)
        assert taken.peak_bytes is not None
        assert 0.9 * mib * MIB < taken.peak_bytes < (mib + 24) * MIB
    assert len(held)


def test_seconds():
    with measured() as taken:
        time.sleep(0.05)
    assert 0.05 <= taken.seconds < 5.0


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), measured() as taken:
        _ = 1 / 0
    assert taken.seconds > 0.0


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    with measured() as taken:
        work(1)
    assert taken.peak_bytes is None
    assert taken.seconds > 0.0
