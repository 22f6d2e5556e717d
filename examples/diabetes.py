"""A regression: how far diabetes went in 442 patients (scikit-learn), squared loss.

    tracin explain examples/diabetes.py --query 3
    tracin audit examples/diabetes.py

There are no classes, so what is explained is the loss itself. TRACIN_RUNS names the folder for the checkpoints,
DIABETES_EPOCHS another number of epochs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn

import tracin

EPOCHS = int(os.environ.get("DIABETES_EPOCHS", "60"))
FOLDER = Path(os.environ.get("TRACIN_RUNS", "runs")) / f"diabetes-{EPOCHS}-epochs"
TRAIN = 342


def data():
    """Ten standardised features and the standardised target: 342 rows to train on, 100 to test; and how to go back."""
    bunch = load_diabetes(scaled=False)
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(bunch.data, dtype=torch.float32)[order]
    y = torch.as_tensor(bunch.target, dtype=torch.float32)[order]
    x_mean, x_spread = x[:TRAIN].mean(0), x[:TRAIN].std(0)
    y_mean, y_spread = y[:TRAIN].mean(), y[:TRAIN].std()
    x, y = (x - x_mean) / x_spread, (y - y_mean) / y_spread

    def render(row):
        features, target = row[0] * x_spread + x_mean, row[1] * y_spread + y_mean
        named = {
            name: round(value, 1) for name, value in zip(bunch.feature_names, features.tolist(), strict=True)
        }
        return {"progression": round(target.item()), **named}

    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), render


def network():
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))


def fit(train, folder, seed):
    """Train, and save six checkpoints."""
    x, y = train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(seed)
    every = max(1, EPOCHS // 6)
    steps = 0
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(len(y), generator=order).split(32):
                optimizer.zero_grad()
                F.mse_loss(model(x[rows])[:, 0], y[rows]).backward()
                optimizer.step()
                steps += 1
            if epoch % every == 0:
                recorder.save(step=steps)
    return recorder.trajectory()


def trained(train, folder):
    """The checkpoints in the folder; trained first where there is none. A run that is cut short leaves no folder."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".training-", dir=folder.parent) as partial:
            fit(train, Path(partial) / "checkpoints", seed=0)
            (Path(partial) / "checkpoints").rename(folder)
    return tracin.Trajectory.from_folder(folder)


def study():
    train, test, render = data()
    return tracin.Study(
        task=tracin.Task(network(), tracin.losses.mean_squared_error),
        trajectory=trained(train, FOLDER),
        train=train,
        test=test,
        fit=fit,
        render=render,
    )
