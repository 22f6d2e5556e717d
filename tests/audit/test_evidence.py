"""Evidence against brute force: gradients of single rows in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import oracle
import tracin
from audit.common import RATES, network64, rows, small
from tracin.audit import Evidence
from tracin.audit.evidence import AGREEMENT, Found, agreement_of, evidence_of, opposition_of


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def brute(train, queries=None):
    """[m, n]: scores by autograd, one row at a time."""
    states = [network64(seed + 1).state_dict() for seed in range(len(RATES))]
    sides = [
        oracle.trajectory_gradients(network64(0), cross_entropy, part, states)
        for part in (train, train if queries is None else queries)
    ]
    return oracle.scores(*sides, RATES)


def lists(scores, row, sign, k):
    others = [other for other in range(scores.shape[1]) if other != row and scores[row, other] * sign > 0]
    return sorted(others, key=lambda other: (-sign * float(scores[row, other]), other))[:k]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_lists_are_the_strongest_others(k):
    train = rows()
    scores = brute(train)
    asked = [2, 5, 11, 12]
    found = evidence_of(small(), None, train, asked, k)
    agreement = agreement_of(found, train[1])
    assert found.evidence.rows.tolist() == asked
    for at, row in enumerate(asked):
        proponents, opponents = found.evidence.of(row)
        assert [other for other, _ in proponents] == lists(scores, row, 1, k)
        assert [other for other, _ in opponents] == lists(scores, row, -1, k)
        for other, value in (*proponents, *opponents):
            assert value == pytest.approx(float(scores[row, other]), rel=1e-9)
        strongest = lists(scores, row, 1, AGREEMENT)
        same = [int(train[1][other]) == int(train[1][row]) for other in strongest]
        assert float(agreement[at]) == pytest.approx(sum(same) / len(same), rel=1e-12)
    assert found.evidence.of(0) is None


def test_a_query_loss_of_its_own_is_not_read():
    train = rows()
    method = small()
    task = tracin.Task(
        method.task.model,
        tracin.losses.cross_entropy,
        query_loss=lambda model, batch: model(batch[0]).square().sum(1),
    )
    other = tracin.TracInCP(task, method.trajectory, batch_size=4, progress=False)
    one, two = (evidence_of(each, None, train, [3], 4).evidence.of(3) for each in (method, other))
    assert one == two


def test_an_index_gives_nearly_the_same(tmp_path):
    train, method = rows(), small()
    index = tracin.Index.build(method, train, tmp_path / "index", projection=4096, dtype="float32")
    exact = evidence_of(method, None, train, [2, 7], 3).evidence
    near = evidence_of(method, index, train, [2, 7], 3).evidence
    for row in (2, 7):
        assert near.of(row)[0][0][0] == exact.of(row)[0][0][0]
        assert row not in [other for side in near.of(row) for other, _ in side]


def test_opposition_is_the_mean_of_the_influences():
    train, validation = rows(), rows(6, seed=9)
    expected = -brute(train, validation).mean(0)
    found = opposition_of(small(), None, train, validation)
    assert torch.allclose(found, expected, rtol=1e-9)
    assert bool((found > 0).any())


def test_two_rows_have_one_other():
    train = rows(2)
    found = evidence_of(small(), None, train, [0, 1], 5).evidence
    for row in (0, 1):
        both = [other for side in found.of(row) for other, _ in side]
        assert both in ([], [1 - row])


def test_the_agreement_counts_the_proponents_that_are_there():
    labels = torch.tensor([0, 1, 0, 1, 0])
    empty = torch.zeros(3, 0)
    evidence = Evidence(torch.tensor([0, 1, 4]), empty.long(), empty, empty.long(), empty)
    found = Found(evidence, torch.tensor([[2, 1, 3, -1], [3, -1, -1, -1], [-1, -1, -1, -1]]))
    one, two, none = agreement_of(found, labels).tolist()
    assert (one, two) == (pytest.approx(1 / 3), 1.0)
    assert math.isnan(none)
