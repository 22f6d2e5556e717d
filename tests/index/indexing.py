"""What the tests of the index share: a small model with two groups of rates, its rows, and folders compared byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tracin

N, M = 53, 7
RATES = (0.3, 0.07, 0.11)


def net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
        ).to(dtype)


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def by_parameter(rate: float) -> dict[str, float]:
    """Weights and biases at different rates."""
    return {name: rate * (2 if name.endswith("bias") else 1) for name, _ in net(0).named_parameters()}


def method(
    rates: Any = RATES, seed: int = 10, loss: Callable = tracin.losses.cross_entropy, **options: Any
) -> tracin.TracInCP:
    steps = [
        tracin.Checkpoint(net(seed + at).state_dict(), learning_rate=rate, step=10 * at)
        for at, rate in enumerate(rates)
    ]
    task = tracin.Task(net(0), loss)
    settings = {"batch_size": 8, "device": "cpu", "progress": False, **options}
    return tracin.TracInCP(task, tracin.Trajectory(steps), **settings)


def entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
