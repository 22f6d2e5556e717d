"""Fixtures of the study's tests."""

from __future__ import annotations

import pytest

from evaluation.mislabelled.common import design
from tracin.evaluation.mislabelled import read_data
from tracin.evaluation.mislabelled.training import Trainer


@pytest.fixture(scope="module")
def data():
    return read_data(design())


@pytest.fixture
def count(monkeypatch):
    """How often a model of the study is trained."""
    calls = []
    real = Trainer.train

    def train(self, rows, folder, *, schedule, seed):
        calls.append((schedule, seed))
        return real(self, rows, folder, schedule=schedule, seed=seed)

    monkeypatch.setattr(Trainer, "train", train)
    return calls
