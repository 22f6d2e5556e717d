"""Pruthi et al. 2020: at the last layer TracIn is error similarity × activation similarity (+ bias)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin

WEIGHT_RATES, BIAS_RATES = (0.3, 0.07), (0.02, 0.5)


class Net(nn.Module):
    """Features and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def build(seed: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 5, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (n,), generator=generator),
    )


def parts(model: Net, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Errors δ = softmax − one-hot [n, 3] and activations a [n, 6], by formula: no autograd."""
    with torch.no_grad():
        activations = model.features(batch[0])
        return model.head(activations).softmax(-1) - F.one_hot(batch[1], 3), activations


def by_formula(train: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> Tensor:
    """Σ_c (w_W a·a' + w_b)(δ·δ')."""
    total = torch.zeros(len(queries[0]), len(train[0]), dtype=torch.float64)
    for seed, weight_rate, bias_rate in zip((1, 2), WEIGHT_RATES, BIAS_RATES, strict=True):
        (errors, seen), (query_errors, query_seen) = parts(build(seed), train), parts(build(seed), queries)
        total += (weight_rate * query_seen @ seen.T + bias_rate) * (query_errors @ errors.T)
    return total


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_last_layer_is_error_times_activation_similarity(batch_size: int) -> None:
    train, queries = rows(11, seed=3), rows(5, seed=4)
    task = tracin.Task(build(0), tracin.losses.cross_entropy, parameters="head.*")
    trajectory = tracin.Trajectory(
        [
            tracin.Checkpoint(
                build(seed).state_dict(), learning_rate={"head.weight": weight, "head.bias": bias}
            )
            for seed, weight, bias in zip((1, 2), WEIGHT_RATES, BIAS_RATES, strict=True)
        ]
    )
    method = tracin.TracInCP(task, trajectory, batch_size=batch_size, device="cpu", progress=False)
    oracle.assert_close(method.influence(train, queries).values, by_formula(train, queries), 1e-12)
    oracle.assert_close(method.self_influence(train).values, by_formula(train, train).diagonal(), 1e-12)


def test_sign_a_step_on_a_proponent_lowers_the_querys_loss() -> None:
    """And by the score, to first order: loss(θ) − loss(θ − w g(z)) → score(z, z')."""
    train, queries, rate = rows(6, seed=3), rows(2, seed=4), 1e-6
    task = tracin.Task(build(0), tracin.losses.cross_entropy)
    state = build(1).state_dict()
    trajectory = tracin.Trajectory([tracin.Checkpoint(state, learning_rate=rate)])
    scores = tracin.TracInCP(task, trajectory, device="cpu", progress=False).influence(train, queries).values
    measured = torch.zeros_like(scores)
    for index in range(6):
        model = build(1)
        before = F.cross_entropy(model(queries[0]), queries[1], reduction="none").detach()
        F.cross_entropy(model(train[0][index : index + 1]), train[1][index : index + 1]).backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
        measured[:, index] = (
            before - F.cross_entropy(model(queries[0]), queries[1], reduction="none").detach()
        )
    oracle.assert_close(scores, measured, 1e-4)
