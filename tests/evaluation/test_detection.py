"""The detection curve against counting by hand, pair by pair and rank by rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.evaluation import DetectionCurve


@st.composite
def rankings(draw):
    """Scores with ties, and a mask with at least one planted and one clean row."""
    n = draw(st.integers(2, 40))
    scores = draw(st.lists(st.integers(-3, 6).map(float), min_size=n, max_size=n))
    planted = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    return scores, [row in planted for row in range(n)]


@given(rankings())
def test_the_curve_equals_counting_through_the_sorted_rows(ranking):
    scores, planted = ranking
    curve = DetectionCurve(scores, planted)
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    assert curve.order.tolist() == order
    for looked_at in range(len(scores) + 1):
        hits = sum(planted[row] for row in order[:looked_at])
        assert curve.found[looked_at] == hits / sum(planted)
        assert curve.count_at(looked_at / len(scores)) == hits
        assert curve.found_at(looked_at / len(scores)) == hits / sum(planted)


@given(rankings())
def test_auroc_equals_the_share_of_pairs_won(ranking):
    scores, planted = ranking
    pairs = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i in range(len(scores))
        for j in range(len(scores))
        if planted[i] and not planted[j]
    ]
    assert DetectionCurve(scores, planted).auroc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@given(rankings())
def test_average_precision_equals_the_sum_over_thresholds(ranking):
    scores, planted = ranking
    expected, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [flag for score, flag in zip(scores, planted, strict=True) if score >= threshold]
        recall = sum(above) / sum(planted)
        expected += (recall - before) * sum(above) / len(above)
        before = recall
    assert DetectionCurve(scores, planted).average_precision == pytest.approx(expected, abs=1e-12)


@given(rankings())
def test_what_holds_for_every_ranking(ranking):
    curve = DetectionCurve(*ranking)
    assert curve.found[0] == 0.0
    assert curve.found[-1] == 1.0
    assert bool((curve.found.diff() >= 0).all())
    assert bool((curve.found <= curve.perfect).all())
    reversed_curve = DetectionCurve(-curve.values, curve.flags)
    assert curve.auroc + reversed_curve.auroc == pytest.approx(1.0)
    stretched = DetectionCurve(curve.values * 3.0 + 2.0, curve.flags)
    assert torch.equal(stretched.found, curve.found)


def test_the_numbers_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (500,), generator=generator).float()
    planted = torch.rand(500, generator=generator) < scores / 60
    curve = DetectionCurve(scores, planted)
    assert curve.auroc == pytest.approx(metrics.roc_auc_score(planted.numpy(), scores.numpy()), abs=1e-12)
    expected = metrics.average_precision_score(planted.numpy(), scores.numpy())
    assert curve.average_precision == pytest.approx(expected, abs=1e-12)


def test_a_perfect_order_reaches_the_perfect_curve():
    planted = torch.arange(50) % 10 == 3
    curve = DetectionCurve(planted.float(), planted)
    assert torch.equal(curve.found, curve.perfect)
    assert (curve.auroc, curve.average_precision, curve.found_at(0.1)) == (1.0, 1.0, 1.0)


def test_a_share_that_floating_point_puts_just_below_a_row_counts_the_row():
    planted = [row == 28 for row in range(100)]
    curve = DetectionCurve([-float(row) for row in range(100)], planted)
    assert int(0.29 * 100) == 28, "the trap this guards against"
    assert curve.found_at(0.29) == 1.0
    assert curve.found_at(0.28) == 0.0


def test_scores_of_any_kind_are_taken():
    values = torch.tensor([0.5, 2.0, -1.0], requires_grad=True)
    mask = [False, True, False]
    kinds = [values, values.detach().numpy(), values.tolist(), values.detach().bfloat16()]
    assert {DetectionCurve(kind, mask).auroc for kind in kinds} == {1.0}


@pytest.mark.parametrize(
    ("scores", "planted", "message"),
    [
        ([], [], "one number per row"),
        ([[1.0]], [[True]], "one number per row"),
        ([1.0, 2.0], [True], "2 scores and a mask of shape"),
        ([1.0, 2.0], [1, 0], "boolean mask"),
        ([1.0, 2.0], [False, False], "no row is marked"),
        ([1.0, 2.0], [True, True], "every row is marked"),
    ],
)
def test_what_makes_no_curve_is_refused(scores, planted, message):
    with pytest.raises(DataError, match=message):
        DetectionCurve(torch.tensor(scores), torch.tensor(planted, dtype=torch.bool if not planted else None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_its_row(bad):
    with pytest.raises(NotFiniteError, match="row 1 is"):
        DetectionCurve([0.0, bad, 1.0], [True, False, False])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(OptionError, match="from 0 to 1"):
        DetectionCurve([0.0, 1.0], [True, False]).found_at(share)
