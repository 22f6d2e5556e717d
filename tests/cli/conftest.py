"""A study file small enough for every command, and a way to run commands in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tracin.cli import main

STUDY = """
import torch
from torch import nn

import tracin
from tracin.study import Study

NAMES = {names}


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator), torch.arange(n) % 3


def build(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def study():
    checkpoints = [
        tracin.Checkpoint(build(seed).state_dict(), learning_rate=rate, step=10 * seed)
        for seed, rate in ((1, 0.2), (2, 0.05))
    ]
    return Study(
        task=tracin.Task(build(0), {loss}),
        trajectory=tracin.Trajectory(checkpoints),
        train=rows(23, 1),
        test=rows(6, 2),
        class_names=NAMES,
        render={render},
    )


{more}
"""


@dataclass(frozen=True)
class Ran:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file; parts of it can be replaced."""

    def write(
        names: str = "['cat', 'cow', 'dog']",
        loss: str = "tracin.losses.cross_entropy",
        render: str = "lambda row: row[0][0]",
        more: str = "",
    ) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(STUDY.format(names=names, loss=loss, render=render, more=more))
        return path

    return write


@pytest.fixture
def file(write_study: Callable[..., Path]) -> Path:
    """The study file as it is."""
    return write_study()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs ``tracin`` with these arguments."""

    def call(*args: object) -> Ran:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Ran(code, *capfd.readouterr())

    return call
