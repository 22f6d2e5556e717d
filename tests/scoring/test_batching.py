"""Rows of a batch under ``batch_size="auto"``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import tracin
from scoring.common import M, handmade, rows, run
from tracin.scoring import run as module
from tracin.scoring.batching import batch_rows
from tracin.scoring.run import Settings, opened


@given(
    row_bytes=st.integers(1, 1 << 34),
    memory=st.integers(1, 1 << 40),
    queries=st.integers(0, 1 << 40),
    tensor=st.integers(1, 1 << 34),
    scores=st.integers(1, 1 << 34),
)
def test_rows_of_a_batch_stay_within_the_memory(
    row_bytes: int, memory: int, queries: int, tensor: int, scores: int
) -> None:
    first, rest = batch_rows(row_bytes, memory, queries, tensor, scores)
    assert 1 <= first <= rest <= 2048
    assert rest <= 150 or rest * scores < 32 << 20
    held = rest * row_bytes
    assert rest == 1 or held <= memory // 5 or held <= min(3 * queries, memory // 3)
    assert rest == 1 or rest * tensor < 32 << 20
    assert batch_rows(row_bytes, memory, 0, tensor, scores)[1] <= rest


def test_the_batches_go_by_what_the_model_keeps() -> None:
    sizes = {}
    for width in (4, 20_000):
        model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        task = tracin.Task(model, tracin.losses.cross_entropy)
        trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
        rows = (torch.randn(2200, 3), torch.zeros(2200, dtype=torch.int64))
        with opened(task, trajectory, Settings(device="cpu", progress=False), rows, rows) as run:
            run.load(0)
            assert run.train.rows.sizes == run.asked.rows.sizes
            sizes[width] = run.train.rows.sizes
    assert sizes == {4: [64, 2048, 88], 20_000: [64, *[314] * 6, 252]}


def test_rows_of_a_dataset_come_in_smaller_batches() -> None:
    data = TensorDataset(*rows(1200, 1))
    with run(data, False, batch_size="auto") as found:
        found.load(0)
        assert found.train.rows.sizes == [64, 512, 512, 112]


def test_the_batches_go_by_the_gradients_that_are_multiplied_out() -> None:
    asked, states, data = handmade(1 << 18, 60)
    with opened(asked, states, Settings(device="cpu", progress=False, memory=200 << 20), data) as run:
        run.load(0)
        assert run.train.wiring.route("w").startswith("vmap")
        assert 30 << 20 < max(run.train.rows.sizes) * (8 << 18) <= 40 << 20


def test_only_train_batches_read_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of queries need not be large beside the gradients of all of them."""
    beside = []

    def noted(*_: int, queries: int, **__: int) -> tuple[int, int]:
        beside.append(queries)
        return 3, 8

    monkeypatch.setattr(module, "batch_rows", noted)
    with run(batch_size="auto") as found:
        found.load(0)
        assert beside == [M * found.size * 8, 0]
