"""What the tests of representer points share: a classifier, its rows, its losses, and the theorem."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin
from oracle import assert_close

N, M, C, D = 23, 7, 3, 5
WEIGHTS = torch.tensor([0.5, 1.0, 2.5])


def net(bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, D), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(D, C, bias=bias)).to(dtype)


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, C, (n,), generator=generator)


TRAIN, QUERIES = rows(N, 1), rows(M, 2)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """Class weights in float32, which cross_entropy does not take beside float64 logits."""
    return F.cross_entropy(model(batch[0]), batch[1], WEIGHTS.to(batch[0].dtype), reduction="none")


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none", label_smoothing=0.2)


def soft(model: nn.Module, batch: Any) -> Tensor:
    targets = 0.9 * F.one_hot(batch[1], C).to(batch[0].dtype) + 0.1 / C
    return -(targets * F.log_softmax(model(batch[0]), 1)).sum(1)


def squared_hinge(model: nn.Module, batch: Any) -> Tensor:
    """Curved on one side only."""
    signs = 2.0 * F.one_hot(batch[1], C) - 1
    return (1 - signs * model(batch[0])).clamp_min(0).square().sum(1)


def outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


LOSSES = [tracin.losses.cross_entropy, weighted, smoothed, soft, squared_hinge]


def method(
    model: nn.Module | None = None, loss: Any = tracin.losses.cross_entropy, **options: Any
) -> tracin.RepresenterPoints:
    model = model or net()
    given = {"l2": 0.01, "batch_size": 5, "device": "cpu", "progress": False, **options}
    task = tracin.Task(model, loss, outputs=outputs)
    return tracin.RepresenterPoints(task, tracin.Checkpoint(model.state_dict(), step=3), **given)


def with_head(model: nn.Sequential, refit: Any) -> nn.Sequential:
    """The user's model in eval mode, with the refitted head in the place of its own."""
    head = model[-1]
    with torch.no_grad():
        weight = refit.weight.to(head.weight)
        head.weight.copy_(weight[:, :D])
        if head.bias is not None:
            head.bias.copy_(weight[:, D])
    return model.eval()


def theorem(
    refit: Any, model: nn.Sequential, queries: tuple[Tensor, Tensor], values: Tensor, tolerance: float
) -> None:
    """Σ_i score(z_i, z') is the logit of the label under the user's model with the refitted head."""
    logits = with_head(model, refit)(queries[0]).detach()
    assert_close(values.sum(1), logits.gather(1, queries[1][:, None])[:, 0], tolerance, "sums of scores")


class Narrow(nn.Sequential):
    """Reads four columns of inputs that have many."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :4])
