"""A run: checkpoints one after another, routes found once, the first batches checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tracin
from scoring.common import RATES, M, N, method, net, rows, run, task, trajectory
from tracin.errors import RateError
from tracin.gradients.blocks import Dense
from tracin.scoring import run as module
from tracin.scoring.run import Settings, opened, products


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
