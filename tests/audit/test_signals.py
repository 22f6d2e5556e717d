"""Signals against the evaluation's baselines, however the rows are cut into tiles."""

from __future__ import annotations

import pytest
import torch

import tracin
from audit.common import rows, small
from tracin.audit import signals
from tracin.audit.neighbours import Neighbourhood
from tracin.audit.signals import chosen_checkpoints, features_of, has_head, see, targets_of
from tracin.errors import OptionError
from tracin.evaluation import area_under_margin, last_loss, margin, mean_loss
from tracin.scoring.evaluation import evaluate


def whole():
    method = small()
    return evaluate(method.task, method.trajectory, rows(), name="train")


@pytest.mark.parametrize("tile", [1, 5, 100])
def test_they_are_the_baselines(monkeypatch, tile):
    monkeypatch.setattr(
        signals, "_tiles", lambda n, *_: [range(a, min(a + tile, n)) for a in range(0, n, tile)]
    )
    found, expected = see(small(), rows(), neighbours=False), whole()
    assert torch.allclose(found.loss, last_loss(expected))
    assert torch.allclose(found.mean_loss, mean_loss(expected))
    assert torch.allclose(-found.margin, margin(expected))
    assert torch.allclose(-found.aum, area_under_margin(expected))
    assert found.labels.tolist() == rows()[1].tolist()
    assert found.classes == 3
    assert found.neighbour_agreement is None
    chances = expected.logits.double().softmax(2).mean(0)
    check_preference(found, chances)


def check_preference(found, chances):
    for row, given in enumerate(found.labels.tolist()):
        others = [(float(chances[row, label]), -label) for label in range(3) if label != given]
        assert found.suggested[row] == -max(others)[1]
        assert float(found.doubt[row]) == pytest.approx(
            max(others)[0] - float(chances[row, given]), abs=1e-12
        )
        assert found.predicted[row] == chances[row].argmax()


@pytest.mark.parametrize("tile", [4, 100])
def test_neighbours_join_in(monkeypatch, tile):
    monkeypatch.setattr(
        signals, "_tiles", lambda n, *_: [range(a, min(a + tile, n)) for a in range(0, n, tile)]
    )
    found, method = see(small(), rows(), neighbours=True), small()
    votes = Neighbourhood.of(*features_of(method, rows()), 3).votes(torch.arange(13))
    own = votes.gather(1, rows()[1][:, None])[:, 0]
    assert torch.allclose(found.neighbour_agreement, own)
    check_preference(found, (whole().logits.double().softmax(2).mean(0) + votes) / 2)


def test_features_are_what_the_last_layer_sees():
    method = small()
    parts, labels = features_of(method, rows(), [1])
    model = method.task.model
    model.load_state_dict(method.trajectory[1].load())
    assert torch.allclose(parts[0], model[:2](rows()[0]).detach())
    assert labels.tolist() == rows()[1].tolist()


def test_memory_bounds_the_tile():
    assert len(signals._tiles(1000, 10, 2 << 30)) == 1
    tiles = signals._tiles(1000, 10, 40 * 10 * 300)
    assert [len(tile) for tile in tiles] == [300, 300, 300, 100]
    assert signals._tiles(7, 10**9, 1) == [range(row, row + 1) for row in range(7)]


@pytest.mark.parametrize("c", range(1, 12))
def test_chosen_checkpoints_exist_and_hold_the_last(c):
    chosen = chosen_checkpoints(c)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == c - 1
    assert chosen[0] >= 0


def regression(shape=(13, 1)):
    inputs, _ = rows()
    return inputs, inputs.sum(1).reshape(shape)


@pytest.mark.parametrize("shape", [(13,), (13, 1)])
def test_a_regression_tells_targets_and_mean_predictions(shape):
    method = small(1, tracin.losses.mean_squared_error)
    targets, predicted = targets_of(method, regression(shape))
    expected = torch.zeros(13, dtype=torch.float64)
    for checkpoint in method.trajectory:
        model = small(1).task.model
        model.load_state_dict(checkpoint.load())
        expected += model(regression()[0])[:, 0].detach() / 3
    assert torch.allclose(targets, regression()[1].reshape(-1))
    assert torch.allclose(predicted, expected)


def test_several_targets_or_another_loss_tell_none():
    inputs, _ = rows()
    method = small(2, tracin.losses.mean_squared_error)
    assert targets_of(method, (inputs, torch.zeros(13, 2, dtype=torch.float64))) is None
    own = small(1, lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square())
    assert targets_of(own, regression((13,))) is None
    assert see(own, regression((13,)), neighbours=False).labels is None


def test_a_model_without_linear_has_no_head():
    task = tracin.Task(torch.nn.Conv1d(1, 1, 1), lambda model, batch: model(batch).sum((1, 2)))
    method = tracin.TracInCP(task, small().trajectory, progress=False)
    assert not has_head(method)
    assert has_head(small())


def test_one_class_is_refused():
    method = small(1, lambda model, batch: model(batch[0])[:, 0].square())
    task = tracin.Task(
        method.task.model, method.task.loss, outputs=lambda model, batch: (model(batch[0]), batch[1])
    )
    with pytest.raises(OptionError, match="2 classes or more"):
        see(tracin.TracInCP(task, method.trajectory, progress=False), rows(), neighbours=False)
