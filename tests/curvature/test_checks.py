"""Second derivatives that autograd cannot see whole are refused, and kinks and rounding are not mistaken for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from curvature.common import (
    DOUBLE,
    M,
    N,
    curvature_rows,
    flat_rows,
    mlp,
    off,
    once,
    once_loss,
    pictures,
    seeded,
)
from tracin.curvature import dense
from tracin.curvature.operators import GaussNewton, Hessian, product
from tracin.errors import ModelError

LOSS = tracin.losses.cross_entropy


def method(model: nn.Module, loss: Any = LOSS, parameters: Any = "*", **options: Any) -> Any:
    task, at = tracin.Task(model, loss, parameters=parameters), tracin.Checkpoint(model.state_dict())
    quiet: dict[str, Any] = {"damping": 0.5, "batch_size": 8, "device": "cpu", "progress": False}
    return tracin.InfluenceFunctions(task, at, **{**quiet, **options})


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("parameters", ["*", "0.*"])
@pytest.mark.parametrize(
    ("curvature", "solver"),
    [
        ("gauss_newton", "cg"),
        ("gauss_newton", "lissa"),
        ("hessian", "exact"),
        ("hessian", "cg"),
        ("hessian", "lissa"),
    ],
)
def test_a_backward_that_cannot_be_differentiated(
    curvature: str, solver: str, parameters: str, dtype: torch.dtype
) -> None:
    model, rows = once(dtype), flat_rows(N, 1, dtype)
    with oracle.untouched(model, rows), pytest.raises(ModelError, match="@once_differentiable") as caught:
        method(model, parameters=parameters, curvature=curvature, solver=solver).self_influence(rows)
    assert "solver='ekfac'" in str(caught.value)


@pytest.mark.parametrize("solver", ["exact", "ekfac"])
def test_solvers_of_first_derivatives_take_it(solver: str) -> None:
    rows = flat_rows(N, 1)
    found, truth = (method(model, solver=solver).self_influence(rows).values for model in (once(), mlp()))
    assert off(found, truth) < 1e-10


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_a_layer_behind_it_is_not_refused(curvature: str) -> None:
    rows = flat_rows(N, 1)
    found, truth = (
        method(model, parameters="2.*", curvature=curvature, solver="cg").self_influence(rows).values
        for model in (once(), mlp())
    )
    assert off(found, truth) < 1e-8


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("solver", ["exact", "cg", "lissa", "ekfac"])
def test_a_loss_whose_slope_cannot_be_differentiated(solver: str, dtype: torch.dtype) -> None:
    model, rows = mlp(dtype), flat_rows(N, 1, dtype)
    with oracle.untouched(model, rows), pytest.raises(ModelError, match="second derivative of the loss"):
        method(model, once_loss, solver=solver).self_influence(rows)
    with pytest.raises(ModelError, match="not the change of the gradient"):
        method(model, once_loss, solver="cg", curvature="hessian").self_influence(rows)


def hinge(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    right = out.gather(1, batch[1][:, None])
    return (1.0 + out - right).clamp_min(0.0).square().sum(1) + 0.1 * out.abs().sum(1)


def wide(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 3),
        ).to(dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("loss", [LOSS, hinge])
def test_kinks_and_rounding_are_not_refused(loss: Any, dtype: torch.dtype) -> None:
    for seed in range(4):
        batch = pictures(200, seed, dtype)
        with curvature_rows(tracin.Task(wide(dtype), loss), batch, 200) as (_, rows):
            v = torch.randn(1, rows.vectors.size, generator=seeded(9), dtype=DOUBLE)
            for operator in (GaussNewton, Hessian):
                assert bool(product(operator(rows), v).isfinite().all())


def test_a_model_that_does_not_run_in_float64_is_tried_in_its_own_dtype() -> None:
    class Narrow(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.body, self.act, self.head = nn.Linear(4, 6), act, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.body(x))
            return self.head(h + torch.zeros(6, dtype=torch.float32).expand_as(h).to(x.dtype)) @ torch.eye(3)

    torch.manual_seed(0)
    rows = flat_rows(N, 1, torch.float32)
    smooth, broken = Narrow(nn.Tanh()), Narrow(once()[1])
    with oracle.untouched(smooth, rows):
        method(smooth, curvature="hessian", solver="cg", damping=2.0).self_influence(rows)
    with oracle.untouched(broken, rows), pytest.raises(ModelError, match="not the change of the gradient"):
        method(broken, curvature="hessian", solver="cg", damping=2.0).self_influence(rows)


def test_a_loss_that_ignores_the_model_it_is_given() -> None:
    model = once()

    def closed(_: nn.Module, batch: Any) -> Tensor:
        return LOSS(model, batch)

    with pytest.raises(ModelError, match="not the change of the gradient"):
        method(model, closed, curvature="hessian", solver="cg").influence(flat_rows(N, 1), flat_rows(M, 2))


def test_the_check_is_made_once() -> None:
    calls = 0

    def counted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return LOSS(model, batch)

    with curvature_rows(tracin.Task(mlp(), counted), flat_rows(N, 1)) as (_, rows):
        operator = GaussNewton(rows)
        product(operator, torch.ones(1, rows.vectors.size, dtype=DOUBLE))
        calls = 0
        dense.from_products(operator)
    assert calls == 3  # batches of 8, 8 and 7 rows
