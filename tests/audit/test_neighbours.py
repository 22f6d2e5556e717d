"""Votes and near-duplicates against a row-by-row computation."""

from __future__ import annotations

import pytest
import torch

from tracin.audit import neighbours
from tracin.audit.neighbours import Neighbourhood, duplicates_of
from tracin.evaluation import neighbour_disagreement


def features(n=30, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=30, classes=3, seed=5):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tile", [1, 7, 10_000])
def test_votes_are_the_nearest_rows(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "_TILE_BYTES", tile * 8 * 30)
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 4)
    parts, given = [features(seed=1), features(seed=2)], labels()
    found = Neighbourhood.of(parts, given, 3).votes(torch.arange(30))
    for row in range(30):
        votes = torch.zeros(3, dtype=torch.float64)
        for part in parts:
            cosines = [
                float(torch.nn.functional.cosine_similarity(part[row], other, dim=0)) for other in part
            ]
            others = sorted((other for other in range(30) if other != row), key=lambda o: -cosines[o])
            for other in others[:4]:
                votes[given[other]] += 1 / 8
        assert torch.allclose(found[row], votes, atol=1e-12)


@pytest.mark.parametrize("spare", [0, 1, 12, 100])
def test_ties_share_the_places_as_in_the_evaluation(monkeypatch, spare):
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 2)
    monkeypatch.setattr(neighbours, "_SPARE", spare)
    twins = features(6).repeat(5, 1)  # every row five times
    given = labels()
    votes = Neighbourhood.of([twins], given, 3).votes(torch.arange(30))
    other = 1 - votes.gather(1, given[:, None])[:, 0]
    assert torch.allclose(other, neighbour_disagreement(twins, given, k=2), atol=1e-12)
    assert torch.allclose(votes.sum(1), torch.ones(30, dtype=torch.float64))


def test_of_many_rows_a_sample_votes(monkeypatch):
    monkeypatch.setattr(neighbours, "REFERENCE", 12)
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 3)
    whole = Neighbourhood.of([features()], labels(), 3)
    assert len(whole.reference) == 12
    assert whole.reference.tolist() == sorted(set(whole.reference.tolist()))
    votes = whole.votes(torch.arange(30))
    chosen = whole.reference.tolist()
    for row in range(30):
        unit = neighbours.unit(features())
        near = sorted((o for o in chosen if o != row), key=lambda o: -float(unit[row] @ unit[o]))[:3]
        expected = torch.bincount(labels()[near], minlength=3) / 3
        assert torch.allclose(votes[row], expected.double(), atol=1e-12)


@pytest.mark.parametrize("tile", [1, 4, 10_000])
def test_duplicates_are_all_pairs(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "_TILE_BYTES", tile * 8 * 30)
    part, given = features(), labels()
    part[17] = 3 * part[2]
    part[25] = part[2]
    given[2], given[17], given[25] = 0, 1, 0
    found = duplicates_of(part, given, 0.9)
    unit = part / part.norm(dim=1, keepdim=True)
    expected = [
        [one, other]
        for one in range(30)
        for other in range(one + 1, 30)
        if float(unit[one] @ unit[other]) >= 0.9 and given[one] != given[other]
    ]
    assert found.rows.tolist() == expected
    assert [2, 17] in expected
    assert [17, 25] in expected
    assert found.of(17)[:2] == (2, 25)
    assert found.of(29) == tuple(one for one, other in expected if other == 29)
    exact = duplicates_of(part, given, 1.0)
    assert exact.rows.tolist() == [[2, 17], [17, 25]]
    assert exact.cosines.tolist() == pytest.approx([1.0, 1.0])


def test_the_nearest_pairs_are_kept():
    part, given = features(), labels()
    part[17], given[2], given[17] = part[2], 0, 1
    assert duplicates_of(part, given, 0.1, limit=1).rows.tolist() == [[2, 17]]


def test_rows_of_zeros_are_no_duplicates():
    part = torch.zeros(3, 2)
    assert len(duplicates_of(part, torch.tensor([0, 1, 2]), 0.5).rows) == 0
