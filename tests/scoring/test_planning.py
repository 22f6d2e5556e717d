"""The cost told before the run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import oracle
import tracin
from scoring.common import RATES, M, N, method, net, rows, trajectory
from tracin.batch import Batch
from tracin.gradients.engine import Source
from tracin.scoring import run as run_module
from tracin.scoring.run import Run


def test_a_plan_tells_passes_memory_time_and_routes() -> None:
    chosen = method()
    with oracle.untouched(chosen.task.model):
        plan = chosen.plan(rows(N, 1), rows(M, 2))
    assert plan.passes == len(RATES)
    assert plan.seconds > 0
    assert plan.peak_bytes > M * N * 8, "the result itself is part of the peak"
    assert {route.parameters for route in plan.routes} == {("0.weight", "0.bias"), ("2.weight", "2.bias")}
    assert {route.route for route in plan.routes} == {"rule Linear"}
    assert all(route.reason == "" and route.bytes_per_query > 0 for route in plan.routes)
    text = str(plan)
    assert "2 passes over the train rows" in text
    assert "off the fast route" not in text


def test_more_rows_cost_more() -> None:
    few, many = (method().plan(rows(N, 1), rows(m, 2)) for m in (M, 400))
    assert many.peak_bytes > few.peak_bytes
    small, large = (method().plan(rows(n, 1), rows(M, 2)) for n in (N, 1100))
    assert large.seconds > 10 * small.seconds / 5, "a hundred times the rows"
    assert large.peak_bytes > small.peak_bytes


def test_less_memory_means_more_passes_and_a_lower_peak() -> None:
    queries = rows(400, 2)
    roomy, tight = (method(memory=memory).plan(rows(N, 1), queries) for memory in ("2GiB", "20kB"))
    assert roomy.passes == len(RATES)
    assert tight.passes > roomy.passes
    assert tight.passes % len(RATES) == 0
    assert tight.peak_bytes < roomy.peak_bytes


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From here on, how many rows of each side had their gradients made."""
    passes: Counter[str] = Counter()
    gradients = run_module.Run.gradients

    def noted(self: Run, source: Source, batch: Batch, value: Any) -> Any:
        passes[source.rows.name] += batch.size
        return gradients(self, source, batch, value)

    monkeypatch.setattr(run_module.Run, "gradients", noted)
    return passes


@pytest.mark.parametrize("memory", [9_000, 20_000, 1 << 20])
@pytest.mark.parametrize("batch_size", ["auto", 7])
@pytest.mark.parametrize("verb", ["influence", "top_k"])
def test_passes_are_those_of_the_run(
    verb: Any, batch_size: Any, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are whole batches of queries, of which the first is short."""
    monkeypatch.setattr(run_module, "batch_rows", lambda *_, **__: (3, 8))
    train, queries = rows(23, 1), rows(37, 2)
    chosen = method(memory=memory, batch_size=batch_size)
    plan = chosen.plan(train, queries, verb=verb, k=2)
    assert plan.fits
    passes = counted(monkeypatch)
    getattr(chosen, verb)(train, queries, **({"k": 2} if verb == "top_k" else {}))
    assert passes["train"] == 23 * plan.passes


@pytest.mark.parametrize("memory", [600, 9_000, 1 << 20])
@pytest.mark.parametrize("by", [None, [row % 5 for row in range(37)]], ids=["one", "five"])
@pytest.mark.parametrize("normalize", [False, True])
def test_passes_for_groups_are_those_of_the_run(
    memory: int, by: Any, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, groups go in tiles."""
    monkeypatch.setattr(run_module, "batch_rows", lambda *_, **__: (5, 8))
    train, queries = rows(23, 1), rows(37, 2)
    chosen = method(memory=max(memory, 8 * 23 * 5 + 3_000), normalize=normalize)
    plan = chosen.plan(train, queries, verb="aggregate", by=by)
    assert plan.fits
    assert plan.seconds > 0
    parts = dict(plan.parts)
    assert parts["scores"] == (1 if by is None else 5) * 23 * 8
    assert parts["sums of groups"] > 0
    passes = counted(monkeypatch)
    chosen.aggregate(train, queries, by=by)
    assert passes["train"] == 23 * plan.passes
    assert 37 * len(RATES) <= passes["queries"] <= 37 * plan.passes, (
        "batches without rows of a tile are passed by"
    )


def test_sums_are_told_as_they_are_held() -> None:
    """In the factors of their members where these are few, else multiplied out."""
    model = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 50)).double()
    task = tracin.Task(model, lambda m, batch: m(batch[0]).square().sum(1))
    states = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    chosen = tracin.TracInCP(task, states, device="cpu", progress=False)
    found = {}
    for m in (6, 600):
        x = torch.randn(m, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        plan = chosen.plan((x,), (x,), verb="aggregate")
        found[m] = {route.parameters[0]: (route.queries_held, route.bytes_per_query) for route in plan.routes}
        assert dict(plan.parts)["sums of groups"] == sum(size for _, size in found[m].values())
    assert found[6]["2.weight"] == ("Factors", 6 * (60 + 50 + 1) * 8)
    assert found[600]["2.weight"] == ("Dense", 61 * 50 * 8)


def test_groups_are_for_aggregate_alone() -> None:
    with pytest.raises(tracin.errors.OptionError, match="by is for verb='aggregate'"):
        method().plan(rows(N, 1), rows(M, 2), by=[0] * M)
    with pytest.raises(tracin.errors.OptionError, match="aggregate needs queries"):
        method().plan(rows(N, 1), verb="aggregate")
    with pytest.raises(tracin.errors.OptionError, match="by has 3 entries for 5 rows"):
        method().plan(rows(N, 1), rows(M, 2), verb="aggregate", by=[0, 1, 2])


def test_a_slow_route_is_told_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)).double()
    states = [tracin.Checkpoint(model.state_dict(), learning_rate=0.1)]
    chosen = tracin.TracInCP(
        tracin.Task(model, tracin.losses.cross_entropy),
        tracin.Trajectory(states),
        device="cpu",
        progress=False,
    )
    plan = chosen.plan(rows(N, 1), rows(M, 2))
    (slow,) = [route for route in plan.routes if not route.route.startswith("rule")]
    assert slow.parameters == ("1.weight",)
    assert slow.route == "vmap PReLU"
    assert "no rule" in slow.reason
    assert "1 of 3 blocks off the fast route" in str(plan)


def test_how_the_queries_are_held() -> None:
    """A long sequence through a narrow layer is multiplied out, a single use of a wide one stays factored."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 50)).double()
    x = torch.randn(6, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    task = tracin.Task(model, lambda m, batch: m(batch[0]).square().sum(1))
    states = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    plan = tracin.TracInCP(task, states, device="cpu", progress=False).plan((x,), (x[:3],))
    held = {route.parameters[0]: route.queries_held for route in plan.routes}
    assert held == {"0.weight": "Dense", "3.weight": "Outer"}
    size = {route.parameters[0]: route.bytes_per_query for route in plan.routes}
    assert size == {"0.weight": 15 * 8, "3.weight": 110 * 8}


def pictures() -> tuple[nn.Module, torch.Tensor, dict[str, str]]:
    """A convolution on a small map, one in groups, and a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(512, 3),
    )
    told = {
        "0.weight": "norm by products of pixels: about 24.6 k multiplications, 73.7 k multiplied out",
        "2.weight": "norm multiplied out: its channels are in groups",
        "4.weight": "norm factored: that of the input times that of δ",
    }
    return model, torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(1)), told


def words() -> tuple[nn.Module, torch.Tensor, dict[str, str]]:
    """A table of words, and linear layers on three of them."""
    model = nn.Sequential(
        nn.Embedding(5, 30), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2), nn.LayerNorm(2)
    )
    told = {
        "0.weight": "norm by matching tokens",
        "1.weight": "norm by pairs of uses: about 630 multiplications, 3.6 k multiplied out",
        "3.weight": "norm multiplied out: about 240 multiplications, 378 by pairs of uses",
        "4.weight": "norm of the gradient itself",
        "4.bias": "norm of the gradient itself",
    }
    return model, torch.randint(0, 5, (6, 3), generator=torch.Generator().manual_seed(1)), told


@pytest.mark.parametrize("case", [pictures, words])
def test_how_norms_are_taken(case: Any) -> None:
    model, x, told = case()
    task = tracin.Task(model.eval(), lambda m, batch: m(batch[0]).square().flatten(1).sum(1))
    states = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    plan = tracin.TracInCP(task, states, device="cpu", progress=False).plan((x,), verb="self_influence")
    assert {route.parameters[0]: route.why for route in plan.routes} == told
    assert all(why in str(plan) for why in told.values())


def test_norms_of_features() -> None:
    """Under a projection the gradients' own norms are not taken."""
    plan = method(projection=8).plan(rows(N, 1), verb="self_influence")
    assert {route.why for route in plan.routes} == {"projected to 4 features"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    chosen = tracin.TracInCP(
        tracin.Task(net(0, dtype), tracin.losses.cross_entropy),
        trajectory(dtype),
        device="cpu",
        progress=False,
    )
    plan = chosen.plan(rows(N, 1, dtype), rows(M, 2, dtype))
    assert plan.peak_bytes > M * N * 4


class Decoding(Dataset):
    """Rows that a dataset makes each time it is asked."""

    def __init__(self, n: int) -> None:
        self.x, self.y = rows(n, 1)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        return self.x[at].clone(), int(self.y[at])


def test_rows_that_a_dataset_makes_are_planned_where_they_are_kept() -> None:
    row = 4 * 8 + 8  # four float64 inputs and a label
    parts = dict(method().plan(Decoding(300), rows(M, 2)).parts)
    assert parts["rows kept"] == 300 * row
    assert dict(method().plan(rows(300, 1), rows(M, 2)).parts)["rows kept"] == 0, (
        "slices of tensors are not made"
    )
    tight = dict(method(memory="20kB").plan(Decoding(300), rows(M, 2)).parts)
    assert tight["rows kept"] <= 20_000 // 4, "given up when they outgrow their share"
    once = dict(method().plan(Decoding(300), rows(M, 2), verb="top_k").parts)
    assert once["rows kept"] == 0, "read once, all queries being held"
    assert once["checkpoints kept"] > 0
    assert dict(method().plan(Decoding(300), verb="self_influence").parts)["rows kept"] == 300 * row


def test_a_tile_of_top_k_holds_rows_only_where_a_dataset_makes_them() -> None:
    sizes = [
        dict(method().plan(train, rows(M, 2), verb="top_k").parts)["a tile of rows and scores"]
        for train in (rows(300, 1), Decoding(300))
    ]
    assert sizes == [300 * M * 8, 300 * (M * 8 + 4 * 8 + 8)]
