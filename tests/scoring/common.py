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
