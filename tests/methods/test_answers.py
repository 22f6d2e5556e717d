"""Lists are told to be filled by the same few rows by every method, and lists within a class hold no matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracin
from tracin.errors import OptionError
from tracin.methods.answers import top_k_result
from tracin.methods.within import allowed_rows, rows_within
from tracin.scoring.run import Settings
from tracin.scoring.top_k import Lists, Within

N, Q, C = 60, 6, 3


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % C


def heavy() -> tuple[Tensor, Tensor]:
    """Four rows of one class are much longer than the others, two in one direction and two in the other."""
    x, y = rows(N, 1)
    x[:4] = 300.0 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    y[:4] = 0
    return x, y


def methods() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, C).double()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    states = [{name: value * scale for name, value in model.state_dict().items()} for scale in (0.1, 0.01)]
    points = [
        tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, (0.3, 0.07), strict=True)
    ]
    shared: dict[str, Any] = {"device": "cpu", "progress": False, "batch_size": 16}
    return {
        "TracInCP": tracin.TracInCP(task, tracin.Trajectory(points), **shared),
        "normalized": tracin.TracInCP(task, tracin.Trajectory(points), normalize=True, **shared),
        "InfluenceFunctions": tracin.InfluenceFunctions(task, points[-1], damping=1e6, **shared),
        "RepresenterPoints": tracin.RepresenterPoints(task, points[-1], l2=10.0, **shared),
    }


@pytest.mark.parametrize("name", ["TracInCP", "normalized", "InfluenceFunctions", "RepresenterPoints"])
def test_rows_that_fill_every_list_are_told(name: str) -> None:
    found = methods()[name].top_k(heavy(), rows(Q, 2), k=2)
    share = torch.cat([found.proponents.ids, found.opponents.ids], 1).lt(4).double().mean()
    if name == "normalized":
        assert found.notes == ()
        return
    assert float(share) > 0.8
    (note,) = found.notes
    assert note.startswith("the same 4 rows fill")
    assert "normalize=True" in note


def test_lists_that_differ_have_no_note() -> None:
    ids = torch.arange(30).view(6, 5)
    high, low = Lists(torch.rand(6, 5), ids), Lists(torch.rand(6, 5), ids + 30)
    assert top_k_result(high, low, {}, 60).notes == ()
    same = Lists(torch.rand(6, 5), ids[:1].expand(6, 5).contiguous())
    assert len(top_k_result(same, same, {}, 60).notes) == 1
    assert top_k_result(same, same, {}, 20).notes == (), "little choice"


@pytest.mark.parametrize("within", ["label", 1])
def test_classes_take_a_number_per_row_and_query(within: Any) -> None:
    """Never one for each pair of them."""
    method = methods()["TracInCP"]
    settings = Settings(device="cpu", progress=False)
    found = allowed_rows(method.task, method.trajectory[0], settings, rows(N, 1), rows(Q, 2), 3, within)
    assert isinstance(found, Within)
    assert sum(part.numel() for part in vars(found).values()) == N + Q
    out = found.outside(slice(2, 4), torch.arange(10, 15))
    wanted = torch.tensor([2, 0]) if within == "label" else torch.tensor([1, 1])
    assert torch.equal(out, wanted[:, None] != (torch.arange(10, 15) % C)[None])


def test_every_method_refuses_the_same_classes() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    for k, within, told in (
        (2, 1, "only 1 train rows have class 1: give a smaller k"),
        (2, 7, "only 0 train rows have class 7"),
        (2, "class", "give None, 'label' or a class number"),
        (2, True, "within is True"),
        (6, "label", "from 1 to 5"),
    ):
        with pytest.raises(OptionError, match=told):
            rows_within(labels, labels, k, within)
    for name, method in methods().items():
        with pytest.raises(OptionError, match="only 20 train rows have class 0"):
            method.top_k(rows(N, 1), rows(Q, 2), k=21, within=0), name
