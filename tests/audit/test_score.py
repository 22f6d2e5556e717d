"""The score: from 0 to 1, monotone, the same for equal rows, whatever their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracin.audit.score import flagged_by_doubt, flagged_by_size, rank_share, score_of, suspicions_of
from tracin.audit.signals import Seen

VALUES = st.floats(-5, 5).map(lambda value: round(value, 1))  # ties are common


@st.composite
def signals(draw):
    n = draw(st.integers(1, 9))
    names = ("mean_loss", "doubt", "neighbour_agreement")[: draw(st.integers(1, 3))]
    listed = st.lists(VALUES, min_size=n, max_size=n)
    suspicions = {name: torch.tensor(draw(listed), dtype=torch.float64) for name in names}
    flagged = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return suspicions, flagged


def by_hand(suspicions, flagged):
    n = len(flagged)
    scores = []
    for row in range(n):
        shares = []
        for values in suspicions.values():
            below = sum(float(other) < float(values[row]) for other in values)
            equal = sum(float(other) == float(values[row]) for other in values)
            shares.append((below + equal / 2) / n)
        scores.append((float(flagged[row]) + sum(shares) / len(shares)) / 2)
    return torch.tensor(scores, dtype=torch.float64)


@given(signals())
def test_it_is_the_formula(drawn):
    score = score_of(*drawn)
    assert torch.allclose(score, by_hand(*drawn), rtol=0, atol=1e-12)


@given(signals())
def test_it_lies_between_0_and_1_and_the_flag_is_the_half(drawn):
    suspicions, flagged = drawn
    score = score_of(suspicions, flagged)
    assert bool(((score > 0) & (score < 1)).all())
    assert (score >= 0.5).tolist() == flagged.tolist()


@given(signals(), st.data())
def test_it_does_not_fall_when_a_suspicion_rises(drawn, data):
    suspicions, flagged = drawn
    row = data.draw(st.integers(0, len(flagged) - 1))
    name = data.draw(st.sampled_from(sorted(suspicions)))
    raised = {**suspicions, name: suspicions[name].clone()}
    raised[name][row] += data.draw(st.floats(0.1, 4))
    later = flagged.clone()
    later[row] |= data.draw(st.booleans())
    assert score_of(raised, later)[row] >= score_of(suspicions, flagged)[row]


@given(signals(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(drawn, random):
    suspicions, flagged = drawn
    order = list(range(len(flagged)))
    random.shuffle(order)
    moved = score_of({name: values[order] for name, values in suspicions.items()}, flagged[order])
    assert torch.equal(moved, score_of(suspicions, flagged)[order])


def test_equal_rows_have_equal_scores():
    assert rank_share(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("neighbours", [True, False])
def test_the_rule_of_classes_is_told(neighbours):
    flagged, cutoff = flagged_by_doubt(
        torch.tensor([0.2, 0.34, 1 / 3, 0.9, -1.0], dtype=torch.float64), neighbours
    )
    assert flagged.tolist() == [False, True, False, True, False]
    assert cutoff.score == 0.5
    assert cutoff.expected_precision is None
    assert ("similar rows" in cutoff.why) == neighbours
    assert "calibrate" in cutoff.why


def test_the_rule_of_sizes_is_tukeys():
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.1, 9.9], dtype=torch.float64)
    low, high = 2.25, 8.425  # of the six values, interpolated
    flagged, cutoff = flagged_by_size(sizes, "residuals")
    assert not flagged.any()
    assert f"{high + 3 * (high - low):.4g}" in cutoff.why
    far = torch.cat([torch.ones(20), torch.tensor([50.0])]).double()
    assert flagged_by_size(far, "losses")[0].nonzero().flatten().tolist() == [20]


def test_higher_is_more_suspect_in_every_part():
    values = torch.tensor([0.1, 0.7], dtype=torch.float64)
    alone = Seen(loss=values, mean_loss=values + 1)
    assert {name: part.tolist() for name, part in suspicions_of(alone).items()} == {"mean_loss": [1.1, 1.7]}
    parts = suspicions_of(Seen(loss=values, mean_loss=values, doubt=values, neighbour_agreement=1 - values))
    assert set(parts) == {"mean_loss", "doubt", "neighbour_agreement"}
    assert all(bool(part[1] > part[0]) for part in parts.values())
