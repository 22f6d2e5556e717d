"""A trained model of digits with planted flips, and small models in float64, which the tests of the audit share."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tracin
from tracin.audit import Audit, Cutoff
from tracin.evaluation import plant_flips
from tracin.evaluation.mislabelled.data import read_data
from tracin.evaluation.mislabelled.design import Design
from tracin.evaluation.mislabelled.training import Trainer

NAMES = [f"digit {number}" for number in range(10)]
N = 1000


class Digits(NamedTuple):
    """Pictures with labels of which a tenth are wrong."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    true_labels: Tensor
    planted: Tensor


@cache
def trainer() -> Trainer:
    design = Design(
        data="digits", model="cnn", rows=N, epochs=8, rate=0.3, batch=32, checkpoints=6, methods=("loss",)
    )
    return Trainer(design, read_data(design), "cpu")


def fit(train: tuple[Tensor, Tensor], folder: Path, seed: int) -> tracin.Trajectory:
    """Six checkpoints, in memory."""
    saved = trainer().train(train, folder, schedule="cosine", seed=seed)
    return tracin.Trajectory([replace(one, state=one.load()) for one in saved])


@cache
def planted_digits() -> tuple[tracin.TracInCP, Digits]:
    """The method and the data."""
    data = trainer().data
    flips = plant_flips(data.train[1], 0.1, seed=3)
    train = data.train[0], flips.labels
    with tempfile.TemporaryDirectory() as folder:
        trajectory = fit(train, Path(folder) / "checkpoints", 1)
    method = tracin.TracInCP(trainer().task(), trajectory, progress=False, device="cpu")
    return method, Digits(train, data.test, data.train[1], flips.mask)


@cache
def audited_digits() -> Audit:
    method, data = planted_digits()
    return tracin.audit.find_label_issues(method, data.train, class_names=NAMES)


def rows(n: int = 13, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (n,), generator=generator)


def network64(seed: int, outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


RATES = (0.3, 0.07, 0.11)


def small(outputs: int = 3, loss=tracin.losses.cross_entropy, rates=RATES, **options) -> tracin.TracInCP:
    """Three checkpoints of a model in float64; batches of 4."""
    checkpoints = [
        tracin.Checkpoint(network64(seed + 1, outputs).state_dict(), learning_rate=rate)
        for seed, rate in enumerate(rates)
    ]
    task = tracin.Task(network64(0, outputs), loss)
    settings = {"batch_size": 4, "device": "cpu", "progress": False, **options}
    return tracin.TracInCP(task, tracin.Trajectory(checkpoints), **settings)


def made(n: int = 5, **changed) -> Audit:
    """An audit of five rows and three classes, without a model."""
    fields = {
        "score": torch.tensor([0.1, 0.9, 0.5, 0.9, 0.3], dtype=torch.float64)[:n],
        "is_issue": torch.tensor([False, True, True, True, False])[:n],
        "signals": {
            "self_influence": torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0], dtype=torch.float64)[:n],
            "aum": torch.tensor([4.0, -2.0, 0.1, -2.0, 1.0], dtype=torch.float64)[:n],
        },
        "cutoff": Cutoff(0.5, "half of the scale"),
        "given_labels": torch.tensor([0, 1, 2, 0, 1])[:n],
        "suggested_labels": torch.tensor([1, 2, 0, 2, 0])[:n],
        "predicted_labels": torch.tensor([0, 2, 0, 2, 1])[:n],
        "classes": 3,
        "class_names": ("ant", "bee", "fly"),
        **changed,
    }
    return Audit(**fields)
