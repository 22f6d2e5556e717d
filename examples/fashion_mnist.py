"""A study of Fashion-MNIST, 60,000 pictures of clothes: a small CNN, trained once (a minute or less).

    apt-get install dataset-fashion-mnist          # the four idx files, in /usr/share/datasets/fashion-mnist
    tracin audit examples/fashion_mnist.py --out runs/audit

FASHION_MNIST names another folder with the files, FASHION_ROWS how many training rows to use, FASHION_EPOCHS how
long to train, and TRACIN_RUNS where the checkpoints are kept.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tracin

SOURCE = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
ROWS = int(os.environ.get("FASHION_ROWS", "60000"))
EPOCHS = int(os.environ.get("FASHION_EPOCHS", "5"))
FOLDER = Path(os.environ.get("TRACIN_RUNS", "runs")) / f"fashion-mnist-{ROWS}-rows-{EPOCHS}-epochs"

NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MEAN, SPREAD = 0.286, 0.353


def read_idx(name):
    """One idx file, zipped or not, as an array of bytes."""
    path = next((p for p in (SOURCE / f"{name}.gz", SOURCE / name) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{SOURCE} has no {name}.gz. Install the Debian package dataset-fashion-mnist (apt-get install "
            "dataset-fashion-mnist), or set FASHION_MNIST to a folder with the four idx files."
        )
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def rows(name):
    """Normalised pictures [n, 1, 28, 28] and their classes."""
    pictures = torch.as_tensor(read_idx(f"{name}-images-idx3-ubyte").copy())
    labels = torch.as_tensor(read_idx(f"{name}-labels-idx1-ubyte").copy()).long()
    return (pictures[:, None].float() / 255 - MEAN) / SPREAD, labels


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit(train, folder, seed):
    """Train, and save a checkpoint after each epoch."""
    x, y = train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7)
    order = torch.Generator().manual_seed(seed)
    steps = 0
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for epoch in range(1, EPOCHS + 1):
            print(f"training: epoch {epoch} of {EPOCHS}", file=sys.stderr)
            for batch in torch.randperm(len(y), generator=order).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                steps += 1
            scheduler.step()
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
    pictures, labels = rows("train")
    train = (pictures[:ROWS], labels[:ROWS])
    return tracin.Study(
        task=tracin.Task(network(), tracin.losses.cross_entropy),
        trajectory=trained(train, FOLDER),
        train=train,
        test=rows("t10k"),
        class_names=NAMES,
        fit=fit,
        render=lambda row: (row[0][0] * SPREAD + MEAN).clamp(0, 1),  # a row is (picture [1, 28, 28], label)
        read=lambda picture: (torch.as_tensor(picture)[None].float() / 255 - MEAN) / SPREAD,  # bytes [28, 28]
    )
