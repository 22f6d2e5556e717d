"""What the tests of scoring share: a small trajectory, its rows, and a run over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tracin
from tracin.scoring.run import Run, Settings, opened

RATES = (0.3, 0.07)
N, M = 11, 5


def net(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def trajectory(dtype: torch.dtype = torch.float64, rates: Any = RATES) -> tracin.Trajectory:
    return tracin.Trajectory(
        [
            tracin.Checkpoint(net(10 + at, dtype).state_dict(), learning_rate=rate, step=10 * at)
            for at, rate in enumerate(rates)
        ]
    )


def task(model: nn.Module | None = None, **options: Any) -> tracin.Task:
    return tracin.Task(model or net(0), tracin.losses.cross_entropy, **options)


def method(**options: Any) -> tracin.TracInCP:
    return tracin.TracInCP(
        task(), trajectory(), **{"batch_size": 4, "device": "cpu", "progress": False, **options}
    )


class Handmade(nn.Module):
    """A linear layer without a rule: its gradients are multiplied out, and the graph keeps little of a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def handmade(width: int, n: int) -> tuple[tracin.Task, tracin.Trajectory, tuple[Tensor, Tensor]]:
    """Such a layer, a checkpoint of it, and n rows; a row's gradient takes 8·width bytes."""
    model = Handmade(width)
    states = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    x = torch.linspace(-1e-3, 1e-3, width)[None].expand(n, -1)
    return task(model), states, (x, torch.zeros(n, dtype=torch.int64))


@contextmanager
def run(
    train: Any = None, queries: Any = None, asked: tracin.Task | None = None, **options: Any
) -> Iterator[Run]:
    """A run over the rows; ``queries=False`` has none."""
    settings = Settings(**{"batch_size": 4, "device": "cpu", "progress": False, **options})
    train = rows(N, 1) if train is None else train
    queries = rows(M, 2) if queries is None else queries
    with opened(
        asked or task(), trajectory(), settings, train, None if queries is False else queries
    ) as found:
        yield found
