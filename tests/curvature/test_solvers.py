"""Solvers: exact and cg to 1e-8 against a dense float64 curvature, LiSSA with its defaults, and every way to fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracin
from curvature.common import (
    DOUBLE,
    N,
    Tied,
    cnn,
    curvature_rows,
    flat_rows,
    gauss_newton,
    hessian,
    mlp,
    off,
    pictures,
    row_gradients,
    seeded,
    softmax_hessian,
)
from tracin.curvature.cost import cost
from tracin.curvature.operators import CurvatureRows
from tracin.curvature.solvers import CurvatureOptions, Prepared, prepare
from tracin.errors import ConvergenceError, ModelError, NotFiniteError, OptionError

LOSS = tracin.losses.cross_entropy


def prepared(model: nn.Module, batch: Any, **options: Any) -> Prepared:
    with curvature_rows(tracin.Task(model, LOSS), batch) as (run, rows):
        return prepare(rows, run.train.wiring, CurvatureOptions(**options))


def solved(model: nn.Module, batch: Any, g: Tensor, **options: Any) -> tuple[Tensor, Tensor, Prepared]:
    """Solutions and quadratic forms, while the model is loaded."""
    with curvature_rows(tracin.Task(model, LOSS), batch) as (run, rows):
        found = prepare(rows, run.train.wiring, CurvatureOptions(**options))
        return found.solver.solve(g), found.solver.quadratic(g), found


def truth(kind: str, model: nn.Module, batch: Any) -> Tensor:
    return hessian(model, LOSS, batch) if kind == "hessian" else gauss_newton(model, batch, softmax_hessian)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_exact_and_cg_against_the_obvious_matrix(name: str, solver: str, kind: str) -> None:
    model, batch = (mlp(), flat_rows(N, 1)) if name == "mlp" else (cnn(), pictures(N, 1))
    matrix = truth(kind, model, batch)
    damping = 0.01 - min(0.0, 1.2 * float(torch.linalg.eigvalsh(matrix)[0]))
    g = torch.randn(4, size(model), generator=seeded(3), dtype=DOUBLE)
    g[2] = 0.0
    x, quadratic, found = solved(model, batch, g, solver=solver, curvature=kind, damping=damping)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=DOUBLE), g.T).T
    assert off(x, expected) < 1e-8
    assert off(quadratic, (g * expected).sum(1)) < 1e-8
    assert found.rule == "given"


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_the_default_damping(solver: str) -> None:
    model, batch = mlp(), flat_rows(N, 1)
    matrix = truth("gauss_newton", model, batch)
    found = prepared(model, batch, solver=solver)
    assert found.solver.damping == pytest.approx(0.1 * float(matrix.trace()) / len(matrix), rel=1e-9)
    assert found.record()["damping_rule"] == "0.1 × mean eigenvalue (exact)"
    bent = truth("hessian", model, batch)
    low = float(torch.linalg.eigvalsh(bent)[0])
    found = prepared(model, batch, solver=solver, curvature="hessian")
    assert found.solver.damping == pytest.approx(-2 * low, rel=1e-2)
    assert found.record()["damping_rule"] == "−2 λ_min"
    assert found.record()["lambda_min"] == pytest.approx(low, rel=1e-2)


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa"])
def test_a_damping_that_does_not_outweigh_negative_curvature(solver: str) -> None:
    model, batch = mlp(), flat_rows(N, 1)
    low = float(torch.linalg.eigvalsh(truth("hessian", model, batch))[0])
    assert low < 0
    with pytest.raises(OptionError, match="λ_min = -") as caught:
        prepared(model, batch, solver=solver, curvature="hessian", damping=-0.9 * low)
    named = float(str(caught.value).split("λ_min = ")[1].split(",")[0])
    assert named == pytest.approx(low, rel=1e-2)
    assert prepared(model, batch, solver=solver, curvature="hessian", damping=-1.5 * low)


def test_no_damping_on_a_singular_matrix() -> None:
    model, batch = mlp(), flat_rows(N, 1)  # the softmax leaves a direction flat
    high = float(torch.linalg.eigvalsh(truth("gauss_newton", model, batch))[-1])
    with pytest.raises(
        OptionError, match="damping=0 is too small: the smallest eigenvalue of the Gauss-Newton"
    ) as caught:
        prepared(model, batch, solver="exact", damping=0.0)
    advised = str(caught.value).split("Give a damping such as ")[1].split(",")[0]
    assert float(advised) == pytest.approx(1e-3 * high, rel=1e-2)
    for solver in ("cg", "lissa", "ekfac"):
        with pytest.raises(OptionError, match="needs a positive one"):
            prepared(model, batch, solver=solver, damping=0.0)


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa", "ekfac"])
@pytest.mark.parametrize("share", [1e-300, 0.5])
def test_a_damping_that_is_rounding_noise(share: float, solver: str) -> None:
    """λ_min + λ has to exceed p · eps · λ_max, for all solvers alike."""
    model, batch = nn.Linear(4, 3).double(), flat_rows(N, 1)
    matrix = truth("gauss_newton", model, batch)
    noise = len(matrix) * torch.finfo(DOUBLE).eps * float(torch.linalg.eigvalsh(matrix)[-1])
    g = row_gradients(model, LOSS, batch)[:3]
    damping = share if share < 1e-9 else share * noise * (0.05 if solver in {"cg", "ekfac"} else 1.0)
    with pytest.raises(OptionError, match="is too small: the smallest eigenvalue of the Gauss-Newton matrix"):
        solved(model, batch, g, solver=solver, damping=damping)
    if solver in {"exact", "ekfac"}:
        assert prepared(model, batch, solver=solver, damping=100 * noise).solver.damping == 100 * noise


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
def test_no_damping_on_a_matrix_that_is_singular_in_float32(kind: str) -> None:
    """Rounding in float32 makes λ_min positive by far more than float64's."""
    for seed in range(8):
        batch = flat_rows(N, seed, torch.float32)
        with pytest.raises(OptionError, match="λ_max / 1000"):
            prepared(nn.Linear(4, 3), batch, solver="exact", curvature=kind, damping=0.0)


def test_no_damping_on_a_definite_matrix() -> None:
    """Least squares with more rows than features."""
    model, batch = nn.Linear(4, 1).double(), (flat_rows(N, 1)[0], torch.ones(N, 1, dtype=DOUBLE))
    task = tracin.Task(model, tracin.losses.mean_squared_error)
    x1 = torch.cat([batch[0], torch.ones(N, 1, dtype=DOUBLE)], 1)
    matrix = 2 * x1.T @ x1 / N
    g = torch.randn(2, 5, generator=seeded(3), dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, g.T).T
    kinds = (("exact", "gauss_newton"), ("exact", "hessian"), ("cg", "hessian"), ("lissa", "hessian"))
    with curvature_rows(task, batch) as (run, rows):
        for solver, kind in kinds:
            options = CurvatureOptions(curvature=kind, solver=solver, damping=0.0)
            x = prepare(rows, run.train.wiring, options).solver.solve(g)
            assert off(x, expected) < (0.5 if solver == "lissa" else 1e-8), solver


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("solver", ["exact", "cg", "lissa", "ekfac"])
def test_a_loss_without_curvature_has_no_gauss_newton(solver: str, damping: float | None) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()

    def nll(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.nll_loss(model(batch[0]), batch[1], reduction="none")

    def absolute(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - 2.0).abs().sum(1)

    def margin(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.multi_margin_loss(model(batch[0]), batch[1], reduction="none")

    losses = ((nll, "log_softmax, let it return logits"), (absolute, "curvature='hessian'"))
    options = CurvatureOptions(solver=solver, damping=damping)
    for loss, said in (*losses, (margin, "the loss has no second derivative in the model's output")):
        with curvature_rows(tracin.Task(model, loss), flat_rows(N, 1)) as (run, rows):
            for call in (prepare, cost):
                with pytest.raises(ModelError, match=said):
                    call(rows, run.train.wiring, options)


def test_a_first_batch_without_curvature_is_not_all() -> None:
    """Rows far out on a Huber loss are linear, and so are all rows of the first batch."""
    model, (x, _) = nn.Linear(4, 1).double(), flat_rows(N, 1)
    y = torch.zeros(N, 1, dtype=DOUBLE)
    y[:8] = 100.0

    def huber(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.huber_loss(model(batch[0]), batch[1], delta=50.0, reduction="none").sum(1)

    def matrix_of(rows: Any) -> Tensor:
        with curvature_rows(tracin.Task(model, huber), rows) as (run, found):
            prepared = prepare(found, run.train.wiring, CurvatureOptions(damping=1.0))
            return torch.linalg.inv(prepared.solver.solve(torch.eye(5, dtype=DOUBLE)))

    x1 = torch.cat([x, torch.ones(N, 1, dtype=DOUBLE)], 1)[8:]
    assert off(matrix_of((x, y)), x1.T @ x1 / N + torch.eye(5, dtype=DOUBLE)) < 1e-10
    with pytest.raises(ModelError, match="linear in the model's output at every row"):
        matrix_of((x[:8], y[:8]))


def test_a_curvature_too_large_for_a_matrix() -> None:
    with pytest.raises(OptionError, match="51 parameters as a matrix") as caught:
        prepared(mlp(), flat_rows(N, 1), solver="exact", memory=10_000)
    assert "ekfac" in str(caught.value)
    assert "cg" in str(caught.value)
    wide = nn.Linear(4, 40_000)
    with pytest.raises(OptionError, match=r"200,000 parameters as a matrix: 298\.0 GiB, and 894\.1 GiB"):
        prepared(wide, flat_rows(N, 1, torch.float32), solver="exact")


def test_cg_says_which_knob() -> None:
    model, batch = mlp(), flat_rows(N, 1)
    g = torch.randn(3, size(model), generator=seeded(3), dtype=DOUBLE)
    with pytest.raises(ConvergenceError, match="after 2 iterations") as caught:
        solved(model, batch, g, solver="cg", iterations=2, damping=1e-3)
    for knob in ("damping=", "iterations=", "tolerance="):
        assert knob in str(caught.value)
    x, _, found = solved(model, batch, g, solver="cg", tolerance=0.1, damping=1e-3)
    matrix = truth("gauss_newton", model, batch) + 1e-3 * torch.eye(size(model), dtype=DOUBLE)
    residual = float((torch.linalg.vector_norm(g - x @ matrix, dim=1) / g.norm(dim=1)).max())
    assert found.solver.report["residual"] == pytest.approx(residual)
    assert residual <= 0.1


def test_cg_in_float32_says_when_rounding_stops_it() -> None:
    model, batch = mlp(torch.float32), flat_rows(N, 1, torch.float32)
    g = torch.randn(3, size(model), generator=seeded(3), dtype=DOUBLE)
    x, _, found = solved(model, batch, g, solver="cg")
    exact, _, _ = solved(model, batch, g, solver="exact")
    assert off(x, exact) < 1e-2
    assert found.solver.report["residual"] < 1e-3
    with pytest.raises(ConvergenceError, match="float64 model"):
        solved(model, batch, g, solver="cg", tolerance=1e-12)


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_a_gradient_that_is_not_finite(solver: str) -> None:
    g = torch.full((1, size(mlp())), float("nan"), dtype=DOUBLE)
    with pytest.raises(NotFiniteError, match="row 0 of the 1 gradients"):
        solved(mlp(), flat_rows(N, 1), g, solver=solver, damping=0.1)


def test_a_second_derivative_that_is_not_finite() -> None:
    def rooted(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 0.0).abs().pow(1.5).sum(1)  # slope 0, second derivative infinite

    with (
        curvature_rows(tracin.Task(mlp(), rooted), flat_rows(N, 1)) as (run, rows),
        pytest.raises(NotFiniteError, match="not finite"),
    ):
        prepare(rows, run.train.wiring, CurvatureOptions(curvature="hessian"))


def trained_cnn() -> tuple[nn.Module, Any]:
    """A small CNN in float32 after some steps of SGD, and its rows."""
    model, batch = cnn(torch.float32), pictures(130, 1, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        LOSS(model, batch).mean().backward()
        optimizer.step()
    model.zero_grad()
    return model, batch


def test_lissa_converges_on_a_cnn_with_its_defaults() -> None:
    model, batch = trained_cnn()
    task, at = tracin.Task(model, LOSS), tracin.Checkpoint(model.state_dict())
    options: dict[str, Any] = {"device": "cpu", "progress": False, "batch_size": 40}
    queries = pictures(3, 7, torch.float32)
    lissa = tracin.InfluenceFunctions(task, at, solver="lissa", **options).influence(batch, queries)
    damping = lissa.provenance["damping"]
    exact = tracin.InfluenceFunctions(task, at, damping=damping, **options).influence(batch, queries)
    pearson = torch.corrcoef(torch.stack([lissa.values.reshape(-1), exact.values.reshape(-1)]))[0, 1]
    assert float(pearson) > 0.99
    assert off(lissa.values, exact.values) < 0.1
    told = lissa.provenance["solution"]
    assert told["residual"] <= 0.05
    assert told["iterations"] < 10_000


def test_lissa_draws_the_same_batches_again() -> None:
    model, batch = trained_cnn()
    g = torch.randn(2, size(model), generator=seeded(3))
    options: dict[str, Any] = {"solver": "lissa", "damping": 0.3}
    with curvature_rows(tracin.Task(model, LOSS), batch) as (run, rows):
        first, again, other = (
            prepare(rows, run.train.wiring, CurvatureOptions(**options, seed=seed)).solver.solve(g)
            for seed in (0, 0, 1)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    exact = solved(model, batch, g, damping=0.3)
    assert off(first, exact[0]) < 0.05


def test_lissa_in_the_flattest_direction_of_a_hessian() -> None:
    """A damping just above −λ_min has solutions far longer than 1/λ."""
    model, batch = mlp(), flat_rows(N, 1)
    matrix = truth("hessian", model, batch)
    values, vectors = torch.linalg.eigh(matrix)
    damping = -1.05 * float(values[0])
    g = vectors[:, :1].mT.contiguous()
    x, _, found = solved(model, batch, g, solver="lissa", curvature="hessian", damping=damping)
    assert float(x.norm()) > 10 / damping
    assert off(x, g / (damping + float(values[0]))) < 0.06
    with pytest.raises(ConvergenceError, match="diverged at step"):
        solved(model, batch, g, solver="lissa", curvature="hessian", damping=damping, scale=0.05)
    assert found.solver.report["residual"] <= 0.05


def counted_passes(rows: CurvatureRows) -> tuple[CurvatureRows, list[int]]:
    seen: list[int] = []

    def batches() -> Any:
        seen.append(1)
        return rows.batches()

    return replace(rows, batches=batches), seen


COUNTED = [
    (name, solver, kind)
    for name in ("mlp", "tied")
    for solver in ("exact", "cg", "lissa", "ekfac")
    for kind in ("gauss_newton", "hessian")
    if solver != "ekfac" or (name, kind) == ("mlp", "gauss_newton")
]


@pytest.mark.parametrize("damping", [None, 2.0])
@pytest.mark.parametrize(("name", "solver", "kind"), COUNTED)
def test_the_cost_counts_what_is_done(name: str, solver: str, kind: str, damping: float | None) -> None:
    torch.manual_seed(2)
    model, batch = mlp() if name == "mlp" else Tied().double(), flat_rows(N, 1)
    options = CurvatureOptions(curvature=kind, solver=solver, damping=damping, memory=2 << 20)
    with curvature_rows(tracin.Task(model, LOSS), batch) as (run, rows):
        told = cost(rows, run.train.wiring, options)
        counted, seen = counted_passes(rows)
        prepare(counted, run.train.wiring, options)
    assert told.seconds > 0 or not seen
    if kind == "gauss_newton" or solver == "exact":
        batchwise = 30 if solver == "lissa" else 0  # power iteration on batches, not on passes
        assert told.passes - batchwise == len(seen)
    else:
        assert len(seen) <= told.passes <= len(seen) + 30 + size(model)


def test_lissa_says_which_knob() -> None:
    model, batch = trained_cnn()
    g = torch.randn(2, size(model), generator=seeded(3))
    with pytest.raises(ConvergenceError, match="diverged at step") as caught:
        solved(model, batch, g, solver="lissa", damping=1e-2, scale=0.05)
    assert "scale=" in str(caught.value)
    with pytest.raises(ConvergenceError, match="after 10 steps") as caught:
        solved(model, batch, g, solver="lissa", damping=1e-3, iterations=10)
    for knob in ("damping=", "iterations=", "tolerance="):
        assert knob in str(caught.value)
