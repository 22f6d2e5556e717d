"""A small training run, for the recorder to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tracin import Checkpoint, CheckpointRecorder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 2)).square().sum().backward()


def two_groups(model: Net, body: Any = 0.5, head: Any = 0.125) -> SGD:
    groups = [
        {"params": model.body.parameters(), "lr": body},
        {"params": model.head.parameters(), "lr": head},
    ]
    return SGD(groups)


def go(model: nn.Module, optimizer: Optimizer, times: int = 1) -> None:
    for _ in range(times):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def rates(checkpoint: Checkpoint, weighting: str = "learning_rate") -> dict[str, float]:
    return checkpoint.rates(weighting, ["body.0.weight", "head.bias"])


def recorded(folder: Path, *steps: int) -> list[Path]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    paths = []
    with CheckpointRecorder(folder, model, optimizer) as recorder:
        for step in steps:
            go(model, optimizer)
            paths.append(recorder.save(step=step))
    return paths
