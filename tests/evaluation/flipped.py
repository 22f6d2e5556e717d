"""A trained model with planted flips, which the tests of the simple scores share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin
from tracin import evaluation

C = 4


def trained() -> tuple[tracin.Task, tracin.Trajectory, tuple[Tensor, Tensor], Tensor]:
    """Classes that overlap a little, a tenth of the labels flipped, five checkpoints at two rates."""
    generator = torch.Generator().manual_seed(2)
    true = torch.arange(160) % C
    x = 2.2 * F.one_hot(true, 6).float() + 0.7 * torch.randn(160, 6, generator=generator)
    flips = evaluation.plant_flips(true, 0.1, seed=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    checkpoints = []
    for rate in (0.2, 0.2, 0.2, 0.07, 0.07):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(3):
            for some in torch.randperm(160, generator=generator).split(30):
                optimizer.zero_grad()
                F.cross_entropy(model(x[some]), flips.labels[some]).backward()
                optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoints.append(tracin.Checkpoint(state, learning_rate=rate))
    task = tracin.Task(model, tracin.losses.cross_entropy)
    return task, tracin.Trajectory(checkpoints), (x, flips.labels), flips.mask


TASK, TRAJECTORY, ROWS, MASK = trained()


def auroc(scores: Tensor) -> float:
    return evaluation.DetectionCurve(scores, MASK).auroc
