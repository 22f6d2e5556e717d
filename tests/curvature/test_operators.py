"""Products and matrices against the curvature the obvious way, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    seeded,
    sigmoid_hessian,
    softmax_hessian,
    square_hessian,
)
from tracin.curvature import dense, spectrum
from tracin.curvature.columns import Columns, missing
from tracin.curvature.operators import GaussNewton, Hessian, product
from tracin.errors import ConvergenceError, ModelError, OptionError

Case = tuple[Callable[[], nn.Module], Any, Any, Callable[[Tensor], Tensor]]


def smooth(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the user's own: label smoothing, and a factor per row."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.2) * 1.5


def regression(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return flat_rows(n, seed)[0], torch.randn(n, 3, generator=seeded(seed + 5), dtype=DOUBLE)


def labels(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return flat_rows(n, seed)[0], torch.rand(n, 3, generator=seeded(seed + 5), dtype=DOUBLE)


def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double()


def soft(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return flat_rows(n, seed)[0], 0.3 * torch.rand(n, 3, generator=seeded(seed + 5), dtype=DOUBLE)


def soft_hessian(n: int, seed: int) -> Callable[[Tensor], Tensor]:
    weight = soft(n, seed)[1].sum(1)[:, None, None]
    return lambda logits: softmax_hessian(logits) * weight


CASES: dict[str, Case] = {
    "mlp": (mlp, tracin.losses.cross_entropy, flat_rows, softmax_hessian),
    "cnn": (cnn, tracin.losses.cross_entropy, pictures, softmax_hessian),
    "layer norm": (normed, tracin.losses.cross_entropy, flat_rows, softmax_hessian),
    "square": (mlp, tracin.losses.mean_squared_error, regression, square_hessian),
    "sigmoid": (mlp, tracin.losses.binary_cross_entropy, labels, sigmoid_hessian),
    "soft targets": (mlp, tracin.losses.cross_entropy, soft, soft_hessian(N, 1)),
    "own loss": (mlp, smooth, flat_rows, lambda logits: 1.5 * softmax_hessian(logits)),
    "tied": (lambda: Tied().double(), tracin.losses.cross_entropy, flat_rows, softmax_hessian),
    "called twice": (lambda: Tied(False).double(), tracin.losses.cross_entropy, flat_rows, softmax_hessian),
}


@pytest.mark.parametrize("name", CASES)
def test_both_curvatures_against_the_obvious_matrix(name: str) -> None:
    make, loss, rows, output_hessian = CASES[name]
    torch.manual_seed(1)
    model, batch = make(), rows(N, 1)
    truths = {GaussNewton: gauss_newton(model, batch, output_hessian), Hessian: hessian(model, loss, batch)}
    with curvature_rows(tracin.Task(model, loss), batch) as (run, found):
        v = torch.randn(3, found.vectors.size, generator=seeded(9), dtype=DOUBLE)
        for operator, truth in truths.items():
            assert off(product(operator(found), v), v @ truth) < 1e-12, operator.__name__
            assert off(dense.from_products(operator(found)), truth) < 1e-12, operator.__name__
        if name == "tied":
            assert missing(found, run.train.wiring) == {
                "first.weight": missing(found, run.train.wiring)["first.weight"]
            }
        else:
            columns = Columns(found, run.train.wiring)
            assert off(dense.from_columns(columns), truths[GaussNewton]) < 1e-12


def test_a_subset_of_parameters() -> None:
    names = ["0.bias", "2.weight"]
    model, batch = mlp(), flat_rows(N, 1)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy, parameters=names), batch) as (
        run,
        rows,
    ):
        truth = gauss_newton(model, batch, softmax_hessian, names)
        assert off(dense.from_products(GaussNewton(rows)), truth) < 1e-12
        assert off(dense.from_columns(Columns(rows, run.train.wiring)), truth) < 1e-12
        bent = hessian(model, tracin.losses.cross_entropy, batch, names)
        assert off(dense.from_products(Hessian(rows)), bent) < 1e-12


def test_batches_do_not_matter() -> None:
    model, batch = cnn(), pictures(N, 1)
    found = []
    for size in (5, 100):
        with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch, size) as (run, rows):
            columns = Columns(rows, run.train.wiring)
            found.append((dense.from_products(Hessian(rows)), dense.from_columns(columns)))
    for few, many in zip(*found, strict=True):
        assert off(few, many) < 1e-12


def test_the_comparison_sees_a_sum_in_place_of_a_mean() -> None:
    model, batch = mlp(), flat_rows(N, 1)
    truth = gauss_newton(model, batch, softmax_hessian)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (_, rows):
        planted = dense.from_products(GaussNewton(rows)) * N / (N - 1)
    assert off(planted, truth) > 1e-3


def test_a_model_that_vmap_cannot_run() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            if grad.detach().sum().item() == float("inf"):  # a number out of a tensor: vmap refuses
                raise RuntimeError("infinite")
            return grad * x.exp()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Stubborn.apply(0.3 * self.a(x)))

    model, batch = Model().double(), flat_rows(N, 1)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (_, rows):
        for operator, truth in (
            (GaussNewton(rows), gauss_newton(model, batch, softmax_hessian)),
            (Hessian(rows), hessian(model, tracin.losses.cross_entropy, batch)),
        ):
            assert off(dense.from_products(operator), truth) < 1e-12
            assert not operator._pull.batched


def test_attention_is_differentiated_twice() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.reshape(len(x), 1, -1, 4)).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    x = torch.randn(7, 12, generator=seeded(0), dtype=DOUBLE)
    batch = x, torch.randint(0, 3, (7,), generator=seeded(1))
    model = Attentive().double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = hessian(model, tracin.losses.cross_entropy, batch)
    with curvature_rows(tracin.Task(model, tracin.losses.cross_entropy), batch) as (_, rows):
        assert off(dense.from_products(Hessian(rows)), truth) < 1e-10


def test_losses_that_gauss_newton_cannot_split() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        return tracin.losses.cross_entropy(model, batch) + sum(p.square().sum() for p in model.parameters())

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - model(-batch[0])).square().sum(1)

    def inside(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model[2](torch.tanh(model[0](batch[0]))), batch[1], reduction="none")

    for loss, message in (
        (penalised, "past the model's output"),
        (twice, "more than once"),
        (inside, "never calls the model"),
    ):
        model, batch = mlp(), flat_rows(N, 1)
        with curvature_rows(tracin.Task(model, loss), batch) as (_, rows):
            v = torch.ones(1, rows.vectors.size, dtype=DOUBLE)
            with pytest.raises(ModelError, match=message) as caught:
                product(GaussNewton(rows), v)
            assert "curvature='hessian'" in str(caught.value)
            assert off(product(Hessian(rows), v), v @ hessian(model, loss, batch)) < 1e-12


def test_a_loss_that_is_not_convex_in_the_output_has_no_root() -> None:
    def bent(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sin().sum(1)

    model, batch = mlp(), flat_rows(N, 1)
    with curvature_rows(tracin.Task(model, bent), batch) as (run, rows):
        with pytest.raises(ModelError, match="not convex"):
            dense.from_columns(Columns(rows, run.train.wiring))
        truth = gauss_newton(model, batch, lambda u: torch.diag_embed(-u.sin()))
        assert off(dense.from_products(GaussNewton(rows)), truth) < 1e-12


def test_extreme_eigenvalues_and_trace() -> None:
    generator = seeded(4)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=DOUBLE)).Q
    values = torch.cat([torch.tensor([-2.0, 5.0], dtype=DOUBLE), torch.linspace(-1, 3, 38, dtype=DOUBLE)])
    matrix = basis @ torch.diag(values) @ basis.T

    def times(v: Tensor) -> Tensor:
        return v @ matrix

    low = spectrum.smallest(times, 40, matrix, tolerance=1e-9)
    assert low.value == pytest.approx(-2.0, abs=1e-6)
    high, vector = spectrum.largest(times, 40, matrix, iterations=500, tolerance=1e-6)
    assert high.value == pytest.approx(5.0, abs=1e-5)
    assert off(times(vector), 5.0 * vector) < 1e-4
    estimate = spectrum.trace(times, 40, matrix, probes=4000)
    assert estimate == pytest.approx(float(matrix.trace()), rel=0.05)
    assert spectrum.smallest(times, 40, matrix, seed=1).value == pytest.approx(-2.0, abs=1e-2)


def test_the_smallest_eigenvalue_beside_a_far_larger_one() -> None:
    bulk = 0.1 * torch.linspace(-1, 1, 396, dtype=DOUBLE)
    far = torch.tensor([1000.0, 400.0, 90.0, -0.13], dtype=DOUBLE)
    values = torch.cat([far, bulk])

    def times(v: Tensor) -> Tensor:
        return v * values

    for seed in range(5):
        low = spectrum.smallest(times, 400, values, seed=seed)
        assert low.value == pytest.approx(-0.13, rel=3e-3)
        assert -0.131 < low.least <= -0.13
        assert low.products < 200
    coarse = spectrum.smallest(times, 400, values.float(), floor=1.0)  # held against a damping of 1
    assert -0.14 < coarse.least <= -0.13
    with pytest.raises(ConvergenceError, match="not known after 12 products") as caught:
        spectrum.smallest(times, 400, values, iterations=12)
    for knob in ("damping=", "memory=", "float64", "gauss_newton"):
        assert knob in str(caught.value)


def test_vectors_that_do_not_fit_the_memory() -> None:
    assert spectrum.steps_of(51, 2 << 30) == 51
    assert spectrum.steps_of(10**6, 2 << 30) == 134
    assert spectrum.steps_of(10**4, 2 << 30) == 200
    with pytest.raises(OptionError, match=r"vector of 100,000,000 float64 numbers .*Raise memory="):
        spectrum.steps_of(10**8, 2 << 30)
    assert [spectrum.probes_at_once(p, 2 << 30) for p in (51, 10**6, 10**8)] == [64, 16, 1]
    matrix = torch.diag(torch.linspace(1, 3, 40, dtype=DOUBLE))
    matrix[3, 5] = matrix[5, 3] = 0.7
    sizes: list[int] = []

    def times(v: Tensor) -> Tensor:
        sizes.append(len(v))
        return v @ matrix

    whole, tiled = (spectrum.trace(times, 40, matrix, at_once=at_once) for at_once in (64, 24))
    assert sizes == [64, 24, 24, 16]
    assert tiled == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx(float(matrix.trace()), rel=0.05)
