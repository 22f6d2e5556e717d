"""EKFAC: against curvlinops' of the same Fisher, against its definition in dense matrices, and its limits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
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
    mlp,
    off,
    pictures,
    seeded,
    softmax_hessian,
)
from tracin.curvature import ekfac
from tracin.curvature.columns import Columns
from tracin.curvature.operators import CurvatureRows
from tracin.curvature.solvers import CurvatureOptions, prepare
from tracin.errors import DataError, ModelError, OptionError
from tracin.scoring.run import Run

MEMORY = 2 << 30


def matrix_of(run: Run, rows: CurvatureRows, **options: Any) -> Tensor:
    """The approximate curvature, multiplied out."""
    bases = ekfac.fit(Columns(rows, run.train.wiring, **options), MEMORY)
    solver = ekfac.EkfacSolver(bases, rows.vectors, 1.0)
    return solver.multiply(torch.eye(rows.vectors.size, dtype=DOUBLE))


def curvlinops() -> Any:
    """The library, which warns of torch's deprecations as it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "curvlinops", reason="curvlinops-for-pytorch is not installed", exc_type=ImportError
        )


ORACLES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (mlp, flat_rows),
    "cnn": (cnn, pictures),
    "called twice": (lambda: Tied(False).double(), flat_rows),
}


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_against_curvlinops_of_the_same_fisher(name: str) -> None:
    library = curvlinops()
    make, data = ORACLES[name]
    model, batch = make(), data(N, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.EKFACLinearOperator(
            model.eval(),
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(batch[0][at : at + 8], batch[1][at : at + 8]) for at in range(0, N, 8)],
            fisher_type="type-2",
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        p = sum(parameter.numel() for parameter in model.parameters())
        truth = theirs @ torch.eye(p, dtype=DOUBLE)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows):
        found = matrix_of(run, rows)
    assert off(found, truth) < 1e-6
    assert off(found * (N - 1) / N, truth) > 1e-3  # the comparison sees a wrong mean


def layer_matrix(model: nn.Module, batch: Any, layer: nn.Linear) -> Tensor:
    """One layer's EKFAC by its definition: eigenvectors of two covariances, and mean squares of rotated gradients."""
    seen: list[Tensor] = []
    made: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen.append(args[0].detach())
        made.append(out)

    hook = layer.register_forward_hook(note)
    logits = model(batch[0])
    hook.remove()
    H = softmax_hessian(logits.detach())
    root = torch.linalg.eigh(H)
    roots = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()[:, None, :]
    ones = torch.ones(N, 1, dtype=DOUBLE)
    inputs = [torch.cat([x, ones], 1) for x in seen]
    A, G = sum(a.T @ a for a in inputs), torch.zeros(layer.out_features, layer.out_features, dtype=DOUBLE)
    gradients = []
    for column in roots.unbind(-1):
        deltas = torch.autograd.grad(logits, made, column, retain_graph=True)
        G += sum(d.T @ d for d in deltas)
        gradients.append(sum(d[:, :, None] * a[:, None, :] for d, a in zip(deltas, inputs, strict=True)))
    Q_G, Q_A = torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors
    squares = sum((Q_G.T @ g @ Q_A).square().sum(0) for g in gradients) / N
    basis = torch.kron(Q_G, Q_A)  # rows: o, then i with the bias last
    whole = basis @ torch.diag(squares.reshape(-1)) @ basis.T
    o, i = layer.out_features, layer.in_features
    order = torch.arange(o * (i + 1)).view(o, i + 1)
    order = torch.cat([order[:, :-1].reshape(-1), order[:, -1]])
    return whole[order][:, order]


@pytest.mark.parametrize("name", ["mlp", "called twice"])
def test_against_its_definition(name: str) -> None:
    make, data = ORACLES[name]
    torch.manual_seed(2)
    model, batch = make(), data(N, 1)
    parts = [layer_matrix(model, batch, layer) for layer in model.modules() if isinstance(layer, nn.Linear)]
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows):
        assert off(matrix_of(run, rows), torch.block_diag(*parts)) < 1e-10


def test_the_trace_is_that_of_gauss_newton_and_other_layers_have_their_own_block() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double()
    batch = flat_rows(N, 1)
    truth = gauss_newton(model, batch, softmax_hessian)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows):
        found = matrix_of(run, rows)
        prepared = prepare(rows, run.train.wiring, CurvatureOptions(solver="ekfac"))
        places = rows.vectors.slices()
    assert float(found.trace()) == pytest.approx(float(truth.trace()), rel=1e-12)
    for name in ("1.weight", "1.bias"):
        at = places[name]
        assert off(found[at, at], truth[at, at]) < 1e-10
    assert prepared.solver.report["dense_blocks"] == ["1.weight", "1.bias"]
    assert prepared.solver.report["factored"] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert prepared.solver.damping == pytest.approx(0.1 * float(truth.trace()) / len(truth), rel=1e-10)


def test_solutions_are_those_of_the_dense_matrix() -> None:
    model, batch = cnn(), pictures(N, 1)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows):
        matrix = matrix_of(run, rows)
        solver = prepare(rows, run.train.wiring, CurvatureOptions(solver="ekfac", damping=0.03)).solver
        g = torch.randn(4, rows.vectors.size, generator=seeded(5), dtype=DOUBLE)
    truth = torch.linalg.solve(matrix + 0.03 * torch.eye(len(matrix), dtype=DOUBLE), g.T).T
    assert off(solver.solve(g), truth) < 1e-10
    assert off(solver.quadratic(g), (g * truth).sum(1)) < 1e-10


def test_sampled_labels_tend_to_the_exact_fisher() -> None:
    model, batch = mlp(), flat_rows(N, 1)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows):
        exact = matrix_of(run, rows)
        few, many = (matrix_of(run, rows, samples=samples) for samples in (1, 1000))
        again = matrix_of(run, rows, samples=1)
        other = matrix_of(run, rows, samples=1, seed=1)
    assert torch.equal(few, again)
    assert off(few, other) > 1e-3
    assert off(many, exact) < 0.15 < off(few, exact)


def test_what_has_no_factors_is_refused_by_name() -> None:
    table = nn.Sequential(nn.Embedding(2000, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens = torch.randint(0, 2000, (N, 3), generator=seeded(0)), flat_rows(N, 1)[1]
    for model, batch, message in (
        (Tied().double(), flat_rows(N, 1), "first.weight has none .shared"),
        (table, tokens, "0.weight .Embedding. has 8,000"),
    ):
        with (
            curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (run, rows),
            pytest.raises(ModelError, match=message) as caught,
        ):
            prepare(rows, run.train.wiring, CurvatureOptions(solver="ekfac"))
        assert "Task(parameters=" in str(caught.value)
        assert "solver='cg'" in str(caught.value)


def test_factors_too_large_for_the_memory() -> None:
    with (
        curvature_rows(tracin.Task(mlp(), tracin.losses.cross_entropy), flat_rows(N, 1)) as (run, rows),
        pytest.raises(OptionError, match="GiB for the factors"),
    ):
        prepare(rows, run.train.wiring, CurvatureOptions(solver="ekfac", memory=1000))


def test_rows_that_use_a_layer_otherwise_than_the_first_rows() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            far = x[:, :1] > 50
            return self.b(torch.where(far, torch.tanh(self.a(h)), h) if bool(far.any()) else h)

    batch = flat_rows(N, 1)
    with curvature_rows(tracin.Task(Sometimes().double(), tracin.losses.cross_entropy), batch) as (run, rows):
        assert matrix_of(run, rows).isfinite().all()
    batch[0][3, 0] = 60.0  # not among the rows that are tried first
    with curvature_rows(tracin.Task(Sometimes().double(), tracin.losses.cross_entropy), batch) as (run, rows):
        # One layout for all calls: the layer used once more is still the same layer.
        assert matrix_of(run, rows).isfinite().all()

    class Folded(Sometimes):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x > 50).any()):
                return self.b(torch.tanh(self.a(torch.cat([x, x]))[: len(x)]))
            return self.b(torch.tanh(self.a(x)))

    with (
        curvature_rows(tracin.Task(Folded().double(), tracin.losses.cross_entropy), batch) as (run, rows),
        pytest.raises(DataError, match="the layer a is used otherwise"),
    ):
        matrix_of(run, rows)


def test_correlation_with_exact(record_property: Callable[[str, object], None]) -> None:
    """Reported, and far above that of plain gradient products: EKFAC is an approximation."""
    pictures, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 12),
            nn.ReLU(),
            nn.Linear(12, 10),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        tracin.losses.cross_entropy(model, (x[:300], y[:300])).mean().backward()
        optimizer.step()
    model.zero_grad()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    at = tracin.Checkpoint(model.state_dict())
    options: dict[str, Any] = {"device": "cpu", "progress": False}
    train, queries = (x[:300], y[:300]), (x[300:320], y[300:320])
    exact, close = (
        tracin.InfluenceFunctions(task, at, solver=solver, **options).influence(train, queries).values
        for solver in ("exact", "ekfac")
    )
    plain = tracin.TracInCP(task, tracin.Trajectory([at]), weighting="uniform", **options)
    pearson, without = (
        float(torch.corrcoef(torch.stack([values.reshape(-1), exact.reshape(-1)]))[0, 1])
        for values in (close, plain.influence(train, queries).values)
    )
    record_property("pearson_ekfac_exact", pearson)
    print(f"Pearson with exact: ekfac {pearson:.3f}, no curvature {without:.3f}")
    assert max(without, 0.0) + 0.2 < pearson < 1.0 - 1e-6


@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm"])
def test_self_influence_from_factors_is_the_diagonal_of_the_scores(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        norm = nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3, bias=False)
        ).double()
    model, batch = {
        "mlp": (mlp(), flat_rows(N, 1)),
        "cnn": (cnn(), pictures(N, 1)),
        "layer norm": (norm, flat_rows(N, 1)),
    }[name]
    task, at = tracin.Task(model, tracin.losses.cross_entropy), tracin.Checkpoint(model.state_dict())
    method = tracin.InfluenceFunctions(task, at, solver="ekfac", batch_size=8, device="cpu", progress=False)
    own, scores = method.self_influence(batch).values, method.influence(batch, batch).values
    assert off(own, scores.diagonal()) < 1e-12
