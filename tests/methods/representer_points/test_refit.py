"""The head is fitted to stationarity, wherever its rows are kept, and what changes in between is refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

import tracin
from methods.representer_points.common import (
    QUERIES,
    TRAIN,
    C,
    D,
    M,
    N,
    Narrow,
    method,
    net,
    weighted,
    with_head,
)
from oracle import assert_close
from tracin.errors import (
    ConvergenceError,
    DataError,
    ModelError,
    OptionError,
)
from tracin.methods.representer_points.head_loss import HeadLoss, Place
from tracin.methods.representer_points.refit import fit_head


@pytest.mark.parametrize("loss", [tracin.losses.cross_entropy, weighted], ids=["ready", "weighted"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_stationary_for_the_loss_of_the_users_model(loss: Any, bias: bool) -> None:
    refit = method(net(bias), loss).refit(TRAIN)
    model = with_head(net(bias), refit)
    parameters = list(model[-1].parameters())
    objective = loss(model, TRAIN).mean() + 0.01 * sum(p.square().sum() for p in parameters)
    gradients = torch.autograd.grad(objective, parameters)
    norm = float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm())
    assert norm <= 1e-10 * 2 * 0.01 * float(refit.weight.norm())
    assert refit.gradient_norm <= 1e-10 * 2 * 0.01 * float(refit.weight.norm())
    assert refit.residual == pytest.approx(refit.gradient_norm / (0.02 * float(refit.weight.norm())))


def test_the_start_of_a_convex_fit_does_not_matter_and_the_same_run_gives_the_same_bits() -> None:
    first = method()
    second = tracin.Checkpoint({**net().state_dict(), "6.weight": torch.zeros(C, D, dtype=torch.float64)})
    moved = tracin.RepresenterPoints(first.task, second, l2=0.01, batch_size=5, progress=False, device="cpu")
    values = first.influence(TRAIN, QUERIES).values
    assert_close(moved.influence(TRAIN, QUERIES).values, values, 1e-8)
    assert torch.equal(method().influence(TRAIN, QUERIES).values, values)


def test_the_record_says_how_far_the_refit_agrees_with_the_model() -> None:
    record = method().influence(TRAIN, QUERIES).provenance
    refit = method().refit(TRAIN)
    own, fitted = net().eval()(TRAIN[0]).detach(), with_head(net(), refit)(TRAIN[0]).detach()
    assert record["agreement"] == float((own.argmax(1) == fitted.argmax(1)).double().mean())
    both = torch.stack([own.reshape(-1), fitted.reshape(-1)])
    assert record["correlation"] == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert (record["head"], record["l2"], record["train_rows"]) == ("6", 0.01, N)
    assert record["checkpoints"][0]["step"] == 3
    assert {"gradient_norm", "residual", "steps", "tolerance", "versions", "scale"} <= set(record)


def test_the_minimum_is_that_of_another_solver() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    features = net().eval()[:-1](TRAIN[0]).detach()
    ones = torch.cat([features, torch.ones(N, 1, dtype=torch.float64)], 1)
    # scikit-learn: Σ ℓ + ‖Θ‖² / (2 C), and λ n = 1 / (2 C).
    solver = sklearn.LogisticRegression(C=1 / (2 * 0.01 * N), fit_intercept=False, tol=1e-12, max_iter=10_000)
    solver.fit(ones.numpy(), TRAIN[1].numpy())
    assert_close(method().refit(TRAIN).weight, torch.from_numpy(solver.coef_), 1e-5, "weights")


def test_rows_that_do_not_fit_are_read_again_and_features_that_do_not_are_refused() -> None:
    wide = (torch.cat([TRAIN[0], torch.zeros(N, 400)], 1), TRAIN[1])
    asked = (torch.cat([QUERIES[0], torch.zeros(M, 400)], 1), QUERIES[1])

    model = Narrow(*net())
    few = method(model, weighted, memory=20_000)
    assert_close(
        few.influence(wide, asked).values, method(loss=weighted).influence(TRAIN, QUERIES).values, 1e-9
    )
    with pytest.raises(OptionError, match=r"the features of 23 train rows take .* GiB, and memory= allows"):
        method(memory=2_000).influence(TRAIN, QUERIES)


class Drifting(Dataset):
    """Rows that change after so many reads."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        return torch.cat([TRAIN[0][row], torch.full((400,), float(self.left < 0))]), TRAIN[1][row]


@pytest.mark.parametrize(
    ("after", "told"), [(3, "came back different"), (N + 5, "changed between two passes")]
)
def test_data_that_changes_is_refused(after: int, told: str) -> None:
    with pytest.raises(DataError, match=f"train: row . {told}"):
        method(Narrow(*net()), weighted, memory=20_000).self_influence(Drifting(after))


def test_a_loss_with_kinks_has_no_stationary_point() -> None:
    def hinge(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        own = logits.gather(1, batch[1][:, None])
        return ((1 + logits - own).clamp_min(0)).sum(1)

    few = (TRAIN[0][:8], TRAIN[1][:8])
    with pytest.raises(ConvergenceError, match=r"not stationary: its gradient is .* Raise l2 or tolerance"):
        method(loss=hinge, l2=1e-3, batch_size=8).self_influence(few)


@pytest.mark.parametrize("memory", ["1GiB", 20_000])
def test_a_loss_without_second_derivative_is_refused(memory: str | int) -> None:
    def margin(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.multi_margin_loss(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ModelError, match="the loss has no second derivative in the model's output"):
        method(loss=margin, l2=1e-3, batch_size=8, memory=memory).self_influence(TRAIN)


def test_a_fit_that_starts_at_the_minimum_takes_no_step() -> None:
    """Features that are all zero leave the head at zero."""
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    slopes = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    fit = fit_head(
        zeros,
        torch.zeros(2, 2, dtype=torch.float64),
        lambda logits: (logits.sum(1), slopes),
        lambda logits: torch.zeros_like,
        l2=0.1,
    )
    assert (fit.steps, fit.gradient_norm, fit.residual) == (0, 0.0, 0.0)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Counting:
    """Rows for the loss in batches, and how many tensors of graphs are alive when each of them is read."""

    def __init__(self, whole: bool) -> None:
        self.whole, self.passes = whole, 0
        self.saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self.alive: list[int] = []

    def keep(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        self.saved.add(saved)
        return saved

    def __call__(self) -> Iterator[tuple[Sequence[int], Any]]:
        self.passes += 1
        for ids in torch.arange(N).split(5):
            self.alive.append(len(self.saved))
            yield ids.tolist(), (None, TRAIN[1][ids])


def head_loss(batches: Counting) -> HeadLoss:
    return HeadLoss(
        tracin.losses.cross_entropy, Place(0, pytree.tree_flatten(torch.zeros(1))[1]), batches, ""
    )


@pytest.mark.parametrize("whole", [True, False])
def test_curvature_holds_one_graph_where_batches_are_not_kept(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, vectors = torch.randn(2, N, C, generator=generator, dtype=torch.float64)
    batches = Counting(whole)
    with torch.autograd.graph.saved_tensors_hooks(batches.keep, lambda saved: saved.tensor):
        products = head_loss(batches).curvature(logits)
        made = batches.passes
        found = [products(vectors), products(2 * vectors)]
    p = logits.softmax(1)
    expected = p * vectors - p * (p * vectors).sum(1, keepdim=True)
    assert_close(found[0], expected, 1e-12)
    assert_close(found[1], 2 * expected, 1e-12)
    if whole:
        assert (made, batches.passes) == (1, 1)
        assert batches.alive[-1] > 0, "the count sees graphs that are kept"
    else:
        assert (made, batches.passes) == (0, 2)
        assert batches.alive == [0] * 10, "a graph outlived its batch"
