"""What the study's methods claim about themselves."""

from __future__ import annotations

import pytest
import torch

from tracin import InfluenceFunctions
from tracin.evaluation import DetectionCurve, plant_flips
from tracin.evaluation.mislabelled import METHODS, Context, Design, read_data
from tracin.evaluation.mislabelled.training import Trainer


def ranks(scores):
    return scores.argsort().argsort().double()


def rank_correlation(one, two):
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(two)]))[0, 1])


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_random_root_ranks_nearly_as_the_exact_expectation_does(model):
    plan = Design(data="digits", methods=("influence",), model=model, rows=300, epochs=12, rate=0.1)
    data = read_data(plan)
    flips = plant_flips(data.train[1], 0.1, classes=10, seed=0)
    rows, trainer = (data.train[0], flips.labels), Trainer(plan, data, "cpu")
    trajectory = trainer.last(rows, 0, schedule="constant")
    exact = InfluenceFunctions(trainer.task(), trajectory[0], solver="ekfac", device="cpu", progress=False)
    expected = exact.self_influence(rows).values
    auroc = DetectionCurve(expected, flips.mask).auroc
    for seed in range(3):
        context = Context(trainer.task(), trajectory, rows, 10, seed, fit=lambda *_: trajectory, device="cpu")
        scores = METHODS["influence"].score(context)
        assert not torch.allclose(scores, expected), "the root is drawn"
        assert rank_correlation(scores, expected) > 0.98
        assert DetectionCurve(scores, flips.mask).auroc == pytest.approx(auroc, abs=0.03)
    assert rank_correlation(expected.roll(1), expected) < 0.5
