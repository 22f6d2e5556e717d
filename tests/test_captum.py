"""Against captum's TracInCP on its slow exact path (per-sample losses, one backward pass per row)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever captum's own imports deprecate
    influence = pytest.importorskip(
        "captum.influence", reason="captum is not installed: nothing to compare with"
    )

RATES = (0.3, 0.07)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(dtype: torch.dtype, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
        )
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def rows(n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return pictures, torch.randint(0, 3, (n,), generator=generator)


def load(model: nn.Module, path: str) -> float:
    """Captum takes the rate from whatever loads the checkpoint."""
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(saved["state"])
    return saved["rate"]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, tracin.TracInCP, torch.dtype]:
    """Captum's method and ours over the same two checkpoints and the same 11 rows."""
    dtype = request.param
    states, paths = [build(dtype, seed).state_dict() for seed in (1, 2)], []
    for index, (state, rate) in enumerate(zip(states, RATES, strict=True)):
        paths.append(str(tmp_path / f"{index}.pt"))
        torch.save({"state": state, "rate": rate}, paths[-1])
    theirs = influence.TracInCP(
        build(dtype, 0),
        torch.utils.data.TensorDataset(*rows(11, 3, dtype)),
        paths,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=11,
        sample_wise_grads_per_batch=False,
    )
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, RATES, strict=True)]
    )
    task = tracin.Task(build(dtype, 0), tracin.losses.cross_entropy)
    return theirs, tracin.TracInCP(task, trajectory, batch_size=11, device="cpu", progress=False), dtype


def test_influence(both: tuple[Any, tracin.TracInCP, torch.dtype]) -> None:
    theirs, ours, dtype = both
    train, queries = rows(11, 3, dtype), rows(5, 4, dtype)
    expected = theirs.influence(queries).detach().double()
    oracle.assert_close(ours.influence(train, queries).values, expected, TOLERANCE[dtype])


def test_self_influence(both: tuple[Any, tracin.TracInCP, torch.dtype]) -> None:
    theirs, ours, dtype = both
    expected = theirs.self_influence().detach().double()
    oracle.assert_close(ours.self_influence(rows(11, 3, dtype)).values, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("proponents", [True, False])
def test_top_k(both: tuple[Any, tracin.TracInCP, torch.dtype], proponents: bool) -> None:
    theirs, ours, dtype = both
    queries = rows(5, 4, dtype)
    ids, values = theirs.influence(queries, k=4, proponents=proponents)
    found = ours.top_k(rows(11, 3, dtype), queries, k=4)
    ranking = found.proponents if proponents else found.opponents
    assert torch.equal(ranking.ids, ids)
    oracle.assert_close(ranking.values, values.detach().double(), TOLERANCE[dtype])
