"""A study of scikit-learn's handwritten digits: a small CNN, trained once.

    tracin audit examples/digits.py
    tracin explain examples/digits.py --query 17 --target predicted --out runs/why

Copy this file and put your own model, data and checkpoints in. The checkpoints are kept in ``runs/``; TRACIN_RUNS names
another folder, and DIGITS_EPOCHS another number of epochs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tracin

EPOCHS = int(os.environ.get("DIGITS_EPOCHS", "10"))
FOLDER = Path(os.environ.get("TRACIN_RUNS", "runs")) / f"digits-{EPOCHS}-epochs"


def data():
    """Pictures from 0 to 1 and labels: 1,438 rows to train on, 359 to test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    return (x[:1438], y[:1438]), (x[1438:], y[1438:])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit(train, folder, seed):
    """Train, and save a checkpoint every second epoch."""
    x, y = train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    order = torch.Generator().manual_seed(seed)
    steps = 0
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(len(y), generator=order).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                steps += 1
            scheduler.step()
            if epoch % 2 == 0 or epoch == EPOCHS:
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
    train, test = data()
    return tracin.Study(
        task=tracin.Task(network(), tracin.losses.cross_entropy),
        trajectory=trained(train, FOLDER),
        train=train,
        test=test,
        class_names=[str(digit) for digit in range(10)],
        fit=fit,
        render=lambda row: row[0][0],  # a row is (picture [1, 8, 8], label)
    )
