"""A run: memory as people write it, checkpoints one after another, routes found once, the first batches checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import tracin
from scoring.common import RATES, M, N, handmade, method, net, rows, run, task, trajectory
from tracin.errors import OptionError, RateError
from tracin.gradients.blocks import Dense
from tracin.scoring import run as module
from tracin.scoring.run import Settings, batch_rows, opened, parse_memory, products


@pytest.mark.parametrize(
    ("memory", "expected"),
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
def test_memory(memory: Any, expected: int) -> None:
    assert parse_memory(memory) == expected


@pytest.mark.parametrize(
    "memory", ["", "GiB", "much", "-1GiB", "0", 0, -5, "1 PiB", "1.2.3GB", "infGB", "nan", True, "2 GB extra"]
)
def test_memory_that_cannot_be_read(memory: Any) -> None:
    with pytest.raises(OptionError, match=r"memory is .*'2GiB'"):
        parse_memory(memory)


@given(amount=st.integers(1, 10**6), unit=st.sampled_from(["", "b", "kb", "kib", "mb", "mib", "gb", "gib"]))
def test_memory_of_any_size(amount: int, unit: str) -> None:
    base = 1024 if "ib" in unit else 1000
    assert parse_memory(f"{amount}{unit}") == amount * base ** " kmg".index(
        (unit or "b")[0].replace("b", " ")
    )


def test_each_checkpoint_is_loaded_with_its_rates() -> None:
    with run() as found:
        for index, rate in enumerate(RATES):
            found.load(index)
            state = trajectory()[index].load()
            for name, value in found.task.model.state_dict().items():
                assert torch.equal(value, state[name])
            assert set(found.rates.values()) == {rate}
            assert found.rates_of(("0.weight", "0.bias")) == (rate, rate)
            assert found.where == f"checkpoint at step {10 * index}"
            assert found.train.where == f"train, checkpoint at step {10 * index}"


def test_routes_are_found_once_per_side(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    wire = module.wire
    monkeypatch.setattr(module, "wire", lambda *args: calls.append(1) or wire(*args))
    asked = task(query_loss=lambda model, batch: model(batch[0]).square().sum(1))
    with run(asked=asked) as found:
        for index in (0, 1, 0):
            found.load(index)
        assert found.keys.fused == {("0.weight", "0.bias"), ("2.weight", "2.bias")}
    assert len(calls) == 2


def test_the_first_batch_of_each_side_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, bool]] = []
    checked = module.checked_gradients

    def noted(source: Any, keys: Any, batch: Any, value: Any, traced: Any, first: bool) -> Any:
        seen.append((source.rows.name, batch.start, first))
        return checked(source, keys, batch, value, traced, first)

    monkeypatch.setattr(module, "checked_gradients", noted)
    method().influence(rows(N, 1), rows(M, 2))
    assert [entry for entry in seen if entry[2]] == [("queries", 0, True), ("train", 0, True)]
    assert len(seen) == 2 * (3 + 2)


def test_rates_are_read_before_any_work() -> None:
    """A missing rate of the last checkpoint is an error before the first is loaded."""
    missing = tracin.Trajectory([*trajectory(), tracin.Checkpoint(net(9).state_dict(), step=77)])
    settings = Settings(device="cpu", progress=False)
    with pytest.raises(RateError, match="step 77"), opened(task(), missing, settings, rows(N, 1)):
        raise AssertionError("the run was opened")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_scores_have_the_parameters_dtype_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    settings = Settings(batch_size=4, device="cpu", progress=False)
    with opened(task(net(0, dtype)), trajectory(dtype), settings, rows(N, 1, dtype)) as found:
        assert found.dtype == expected


def test_products_add_over_parameters_and_skip_what_one_side_lacks() -> None:
    one, two = torch.ones(3, 2, dtype=torch.float64), 2 * torch.ones(4, 2, dtype=torch.float64)
    train = {("a",): Dense(one), ("b",): Dense(3 * one), ("train alone",): Dense(one)}
    queries = {("a",): Dense(two), ("b",): Dense(two), ("queries alone",): Dense(two)}
    found = products(train, queries, 3, 4, torch.empty(0, dtype=torch.float64))
    assert torch.equal(found, torch.full((3, 4), 2 * 2 + 3 * 2 * 2, dtype=torch.float64))
    nothing = products({}, queries, 3, 4, torch.empty(0, dtype=torch.float64))
    assert torch.equal(nothing, torch.zeros(3, 4, dtype=torch.float64))


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
    share = memory // 3 if queries else memory // 5
    assert rest == 1 or (rest * row_bytes <= share and rest * tensor < 32 << 20)
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
