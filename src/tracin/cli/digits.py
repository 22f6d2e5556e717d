"""What the demo traces: scikit-learn's handwritten digits with planted label errors, and a small CNN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracin.checkpoints import CheckpointRecorder, Trajectory
from tracin.errors import MissingExtraError
from tracin.evaluation import plant_flips
from tracin.progress import progress
from tracin.study import Study
from tracin.tasks import Task, losses

__all__ = ["Digits", "digits", "fit", "network", "study_of"]

TEST_SHARE = 0.2
BATCH = 32
RATE, DECAY = 0.3, 0.8


@dataclass(frozen=True, eq=False)
class Digits:
    """Pictures [n, 1, 8, 8] from 0 to 1 with their labels; ``train`` carries the planted ones.

    Args:
        train: Training pictures and labels, some made wrong.
        test: Test pictures and labels.
        true_labels: The training labels before.
        planted: Which training labels were made wrong [n].
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    true_labels: Tensor
    planted: Tensor


def digits(seed: int = 0, flipped: float = 0.1) -> Digits:
    """The 1,797 digits that come with scikit-learn, split, with wrong labels planted into the training rows.

    Args:
        seed: Which split and which flips.
        flipped: The share of training labels made wrong.

    Returns:
        The data.

    Raises:
        MissingExtraError: scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "the demo's digits come with scikit-learn: pip install 'tracin[demo]'"
        ) from error
    images, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    pictures = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16.0
    labels = torch.as_tensor(classes, dtype=torch.int64)[order]
    n = len(labels) - round(TEST_SHARE * len(labels))
    flips = plant_flips(labels[:n], flipped, classes=10, seed=seed)
    return Digits(
        train=(pictures[:n], flips.labels),
        test=(pictures[n:], labels[n:]),
        true_labels=labels[:n],
        planted=flips.mask,
    )


def network(seed: int = 0) -> nn.Sequential:
    """A CNN with two convolutions and two linear layers; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def fit(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = 10,
    show: bool = False,
) -> Trajectory:
    """Train with plain SGD and a decaying rate, saving a checkpoint after every epoch.

    Args:
        model: The network; trained in place.
        train: Pictures and labels.
        folder: Where the checkpoints go.
        seed: The order of the rows.
        epochs: Passes over the rows.
        show: Show how far it is.

    Returns:
        The checkpoints, in memory, so that the folder may go.
    """
    inputs, labels = train
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=DECAY)
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    with (
        CheckpointRecorder(folder, model, optimizer) as recorder,
        progress("training", epochs, show=show) as bar,
    ):
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                steps += 1
            scheduler.step()
            recorder.save(step=steps)
            bar.advance(1)
        return Trajectory([replace(saved, state=saved.load()) for saved in recorder.trajectory()])


def study_of(data: Digits, model: nn.Module, trajectory: Trajectory) -> Study:
    """The study of the trained network."""
    return Study(
        task=Task(model, losses.cross_entropy),
        trajectory=trajectory,
        train=data.train,
        test=data.test,
        class_names=[str(digit) for digit in range(10)],
        render=lambda row: row[0][0],
    )
