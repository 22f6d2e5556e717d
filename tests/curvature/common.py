"""What the tests of curvature share: small models, and their curvature the obvious way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import tracin
from tracin.curvature.operators import CurvatureRows
from tracin.curvature.vectors import Vectors
from tracin.scoring.run import Run, Settings, opened

N, M = 23, 5
DOUBLE = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(dtype: torch.dtype = DOUBLE) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def cnn(dtype: torch.dtype = DOUBLE) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2, stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).to(dtype)


class OnceTanh(torch.autograd.Function):
    """A tanh whose backward cannot be differentiated: autograd finds no path through it and says nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceTanh.apply(x)


def once(dtype: torch.dtype = DOUBLE) -> nn.Module:
    """``mlp`` with that tanh."""
    model = mlp(dtype)
    model[1] = Once()
    return model


def once_loss(model: nn.Module, batch: Any) -> Tensor:
    """A squared error of squashed outputs, whose slope cannot be differentiated whole."""
    return (OnceTanh.apply(model(batch[0])) - 2.0).square().sum(1)


class Tied(nn.Module):
    """One weight used by two layers, and one layer called twice."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if tie:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def flat_rows(n: int, seed: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=seeded(seed), dtype=DOUBLE).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=seeded(seed + 1))


def pictures(n: int, seed: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 1, 4, 4, generator=seeded(seed), dtype=DOUBLE).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=seeded(seed + 1))


def chosen(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return parameters if names is None else {name: parameters[name] for name in names}


def flatten(grads: Any) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in grads])


def row_gradients(model: nn.Module, loss: Any, batch: Any, names: list[str] | None = None) -> Tensor:
    """g of every row by autograd, [n, p]."""
    parameters = list(chosen(model, names).values())
    model.eval()
    losses = loss(model, batch)
    grads = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in losses]
    full = [
        [torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)]
        for row in grads
    ]
    return torch.stack([flatten(row) for row in full]).detach()


def hessian(model: nn.Module, loss: Any, batch: Any, names: list[str] | None = None) -> Tensor:
    """The Hessian of the mean loss, entry by entry: each component of the gradient differentiated again."""
    parameters = list(chosen(model, names).values())
    model.eval()
    gradient = flatten(torch.autograd.grad(loss(model, batch).mean(), parameters, create_graph=True))
    rows = []
    for entry in gradient:
        found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            flatten([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
        )
    return torch.stack(rows).detach()


def gauss_newton(model: nn.Module, batch: Any, output_hessian: Any, names: list[str] | None = None) -> Tensor:
    """(1/N) Σ Jᵀ H J, with J output by output and H from ``output_hessian(outputs) -> [n, C, C]``."""
    parameters = list(chosen(model, names).values())
    model.eval()
    outputs = model(batch[0])
    H = output_hessian(outputs.detach())
    total = torch.zeros(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters), dtype=DOUBLE)
    for row in range(len(outputs)):
        J = torch.stack(
            [
                flatten(torch.autograd.grad(value, parameters, retain_graph=True))
                for value in outputs[row].reshape(-1)
            ]
        ).double()
        total += J.T @ H[row].double() @ J
    return total / len(outputs)


def softmax_hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def square_hessian(outputs: Tensor) -> Tensor:
    size = outputs[0].numel()
    return (2.0 / size) * torch.eye(size, dtype=outputs.dtype).expand(len(outputs), size, size)


def sigmoid_hessian(outputs: Tensor) -> Tensor:
    p = outputs.sigmoid().reshape(len(outputs), -1)
    return torch.diag_embed(p * (1 - p)) / p.shape[1]


@contextmanager
def curvature_rows(
    task: tracin.Task, train: Any, batch_size: int = 8, queries: Any = None
) -> Iterator[tuple[Run, CurvatureRows]]:
    """A run at the model's own weights, and its curvature rows."""
    settings = Settings(weighting="uniform", batch_size=batch_size, device="cpu", progress=False)
    at = tracin.Trajectory([tracin.Checkpoint(task.model.state_dict())])
    with opened(task, at, settings, train, queries) as run:
        run.load(0)
        vectors = Vectors(run.selection.traced)
        yield run, CurvatureRows(run.train, vectors, lambda: run.batches(run.train))


def off(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))
