"""Which parameters were traced, by which route, and which were not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tracin
from scoring.common import rows
from tracin.scoring.coverage import Coverage, CoverageRow


class Net(nn.Module):
    """A parameter of every fate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.twin = nn.Linear(6, 3)
        self.twin.weight = self.last.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.slope = nn.PReLU(6)
        self.idle = nn.Parameter(torch.ones(5))
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.slope(self.first(x) * self.scale)
        return self.last(hidden) + self.twin(hidden)


def coverage(parameters: str | tuple[str, ...] = "*", batch_size: int = 4) -> Coverage:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double()
    task = tracin.Task(model, tracin.losses.cross_entropy, parameters=parameters)
    trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    method = tracin.TracInCP(task, trajectory, batch_size=batch_size, device="cpu", progress=False)
    return method.verify(rows(11, 1)).coverage


def test_every_parameter_once_with_its_route() -> None:
    found = coverage()
    assert {row.parameter: (row.traced, row.route) for row in found.table} == {
        "first.weight": (True, "rule Linear"),
        "first.bias": (False, "frozen"),
        "last.weight": (True, "rule Linear"),
        "last.bias": (True, "rule Linear"),
        "twin.bias": (True, "rule Linear"),
        "scale": (True, "shared by the rows"),
        "slope.weight": (True, "vmap PReLU"),
        "idle": (False, "unused"),
    }
    shapes = {row.parameter: row.shape for row in found.table}
    assert shapes["last.weight"] == (3, 6)
    assert all(row.entries == torch.Size(row.shape).numel() for row in found.table)
    reasons = {row.parameter: row.reason for row in found.table}
    assert "no rule" in reasons["slope.weight"]
    assert "requires_grad" in reasons["first.bias"]
    assert reasons["first.weight"] == ""


def test_the_fraction_counts_entries() -> None:
    found = coverage()
    total = 24 + 6 + 18 + 3 + 3 + 6 + 6 + 5
    assert found.fraction == pytest.approx((total - 6 - 5) / total)
    assert found.by_route() == {
        "rule Linear": 48, "frozen": 6, "shared by the rows": 6, "vmap PReLU": 6, "unused": 5
    }  # fmt: skip
    assert list(found.by_route().values()) == sorted(found.by_route().values(), reverse=True)
    text = str(found)
    assert text.startswith(f"{found.fraction:.1%} of {total} parameters traced: rule Linear 48")


def test_what_no_glob_matches_is_excluded() -> None:
    found = coverage(("last.*", "scale"))
    table = {row.parameter: row for row in found.table}
    assert table["first.weight"].route == table["twin.bias"].route == "excluded"
    assert not table["first.weight"].traced
    assert table["first.bias"].route == "frozen"
    assert table["last.weight"].traced
    assert "glob" in table["idle"].reason


def test_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    found = coverage()
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["parameter", "shape", "entries", "traced", "route", "reason"]
    assert frame["entries"].sum() == sum(row.entries for row in found.table)


def test_rows_that_went_one_by_one_are_told() -> None:
    class Turning(nn.Module):
        """Another way through the layer where a row is far out, which no probe row is."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            far = x[:, :1] > 50
            return torch.where(far, x @ self.layer.weight.T, out) if bool(far.any()) else out

    model = Turning().double()
    x, y = rows(9, 1)
    x[5, 0] = 60.0
    task = tracin.Task(model, tracin.losses.cross_entropy)
    trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    method = tracin.TracInCP(task, trajectory, device="cpu", progress=False)
    table = {row.parameter: row for row in method.verify((x, y), rows=9).coverage.table}
    assert table["layer.weight"].route == "rule Linear"
    assert table["layer.weight"].reason == "9 rows went one by one"


def test_nothing_at_all() -> None:
    assert Coverage(()).fraction == 0.0
    row = CoverageRow("a", (2,), 2, False, "frozen")
    assert Coverage((row,)).fraction == 0.0
