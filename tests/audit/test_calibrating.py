"""Calibration: planted flips, training anew, and what the cut-off then says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import tracin
from audit.common import NAMES, N, audited_digits, fit, made, planted_digits, rows, small
from tracin.audit import Calibration, calibrate, find_label_issues
from tracin.audit.calibrating import FEW, POINTS, curve
from tracin.audit.relabelling import with_labels
from tracin.errors import OptionError, UserCodeError


def study(fitting=None):
    method, data = planted_digits()
    return tracin.Study(
        method.task, method.trajectory, data.train, data.test, class_names=NAMES, fit=fitting or fit
    )


def test_the_cut_off_keeps_its_word_on_digits():
    method, data = planted_digits()
    labels = data.train[1].clone()
    measured = calibrate(study(), method=method, precision=0.6)
    assert torch.equal(data.train[1], labels)
    assert measured.fraction == 0.1
    assert measured.rows == N
    assert list(measured.thresholds) == sorted(measured.thresholds, reverse=True)
    assert list(measured.found) == sorted(measured.found)
    audit = audited_digits().calibrated(measured)
    truth = float(data.planted[audit.is_issue].double().mean())
    assert truth >= 0.6
    assert audit.cutoff.expected_precision == pytest.approx(truth, abs=0.25)
    assert measured.wrong == pytest.approx(0.1, abs=0.04)
    assert audit.cutoff.score == measured.cutoff.score >= 0.5
    assert "10% of the 1,000 labels were made wrong on purpose" in audit.cutoff.why
    assert f"about {measured.wrong:.1%} of the given labels are wrong" in audit.cutoff.why
    assert (audit.score >= audit.cutoff.score).tolist() == audit.is_issue.tolist()
    again = find_label_issues(method, data.train, calibration=measured, evidence=0)
    assert again.is_issue.tolist() == audit.is_issue.tolist()


def test_the_curve_counts():
    scores = torch.tensor([0.9, 0.8, 0.8, 0.7, 0.6, 0.2], dtype=torch.float64)
    planted = torch.tensor([True, True, False, True, False, False])
    found = curve(scores, planted, fraction=0.5, rows=6, seeds=(0,), wanted=0.7, fewest=1)
    assert found.thresholds == pytest.approx((0.9, 0.8, 0.7, 0.6, 0.2))
    assert found.planted_precision == pytest.approx((1, 2 / 3, 3 / 4, 3 / 5, 3 / 6))
    assert found.found == pytest.approx((1 / 3, 2 / 3, 1, 1, 1))
    assert found.flagged == pytest.approx((0, 1 / 3, 1 / 3, 2 / 3, 1))
    # All three planted rows, as there are fewer than ten: the least share of others to planted is at 0.7.
    assert found.wrong == pytest.approx(1 / 3)
    assert found.precision == pytest.approx((1, 2 / 3, 1, 1 / 2, 1 / 3))
    assert found.cutoff.score == 0.7
    assert found.cutoff.expected_precision == 1.0


def calibration(thresholds, precision, wanted=0.9, seeds=(0,)):
    found = tuple((at + 1) / len(thresholds) for at in range(len(thresholds)))
    flagged = tuple(0.1 * share for share in found)
    return Calibration(thresholds, precision, found, flagged, precision, 0.05, 0.1, 100, seeds, wanted)


def test_the_lowest_precise_threshold_is_taken():
    found = calibration((0.9, 0.8, 0.7, 0.6), (1.0, 0.8, 0.92, 0.7))
    assert found.cutoff.score == 0.7
    assert found.cutoff.expected_precision == 0.92
    assert "once" in found.cutoff.why
    assert "No cut-off" not in found.cutoff.why


def test_a_precision_out_of_reach_is_told():
    found = calibration((0.9, 0.8, 0.6, 0.4), (0.5, 0.8, 0.7, 0.1), wanted=0.95, seeds=(0, 1))
    assert found.cutoff.score == 0.6
    assert found.cutoff.expected_precision == 0.7
    assert "No cut-off from 0.5 on reaches the 95%" in found.cutoff.why
    assert "2 times" in found.cutoff.why


def test_the_cut_off_is_not_below_the_flag():
    assert calibration((0.9, 0.6, 0.3), (1.0, 1.0, 1.0)).cutoff.score == 0.6


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2])
def test_the_share_of_wrong_labels_is_recovered(share):
    """Scores of wrong labels lie high, those of right ones are spread: what the estimate assumes."""
    generator = torch.Generator().manual_seed(8)
    n = 20_000
    planted = torch.rand(n, generator=generator) < 0.1
    wrong = (torch.rand(n, generator=generator) < share) & ~planted
    high = 1 - 0.5 * torch.rand(n, generator=generator, dtype=torch.float64) ** 2
    low = 0.8 * torch.rand(n, generator=generator, dtype=torch.float64)
    scores = torch.where(planted | wrong, high, low)
    found = curve(scores, planted, fraction=0.1, rows=n, seeds=(0,), wanted=0.8)
    truth = float(wrong[~planted].double().mean())
    assert found.wrong == pytest.approx(truth, abs=0.02)
    others = (scores >= found.cutoff.score) & ~planted
    if share:
        right = float(wrong[others].double().mean())
        assert found.cutoff.expected_precision == pytest.approx(right, abs=0.1)
        assert found.cutoff.expected_precision >= 0.8
    else:
        assert found.cutoff.expected_precision < 0.05


def test_long_curves_are_thinned():
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = curve(scores, scores > 0.9, fraction=0.1, rows=5000, seeds=(0,), wanted=0.9)
    assert len(found.thresholds) <= POINTS
    assert found.thresholds[0] == float(scores.sort(descending=True).values[FEW - 1])
    assert found.flagged[-1] == found.found[-1] == 1.0


def test_thresholds_that_flag_few_rows_are_left_out():
    scores = torch.arange(100, 0, -1, dtype=torch.float64) / 100
    planted = torch.arange(100) % 5 == 0
    found = curve(scores, planted, fraction=0.2, rows=100, seeds=(0,), wanted=0.9)
    every = curve(scores, planted, fraction=0.2, rows=100, seeds=(0,), wanted=0.9, fewest=1)
    assert len(every.thresholds) == 100
    assert found.thresholds == every.thresholds[FEW - 1 :]
    assert found.precision == every.precision[FEW - 1 :]
    assert found.wrong == every.wrong


def test_the_flag_of_the_rule_stays_in_the_curve_where_it_flags_few():
    scores = torch.cat([torch.tensor([0.9, 0.8, 0.7]), torch.linspace(0.4, 0.1, 40)]).double()
    planted = torch.arange(43) < 4
    found = curve(scores, planted, fraction=0.1, rows=43, seeds=(0,), wanted=0.9)
    assert found.thresholds[:2] == pytest.approx((0.7, float(scores[FEW - 1])))
    assert found.cutoff.score == pytest.approx(0.7)
    few = curve(scores[:5], planted[:5], fraction=0.1, rows=5, seeds=(0,), wanted=0.9)
    assert few.thresholds == pytest.approx((0.7, float(scores[4])))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"precision": 1.0}, "precision is 1.0"),
        ({"fraction": 1.0}, "fraction"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_an_argument_out_of_range(options, fact):
    with pytest.raises(OptionError, match=fact):
        calibrate(study(), method=planted_digits()[0], **options)


def test_what_cannot_train_is_refused():
    with pytest.raises(OptionError, match=r"Study\(fit="):
        calibrate(replace(study(), fit=None))
    with pytest.raises(OptionError, match="fit returned a list"):
        calibrate(study(lambda *_: []), method=planted_digits()[0])
    with pytest.raises(UserCodeError, match="fit raised ZeroDivisionError"):
        calibrate(study(lambda *_: 1 / 0), method=planted_digits()[0])


def test_a_task_without_classes_is_refused():
    method = small(1, tracin.losses.mean_squared_error)
    inputs, _ = rows()
    train = (inputs, inputs.sum(1))
    plain = tracin.Study(method.task, method.trajectory, train, train, fit=lambda *_: method.trajectory)
    with pytest.raises(OptionError, match="has none"):
        calibrate(plain, method=method)


class Named(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 3

    def __getitem__(self, row):
        inputs, label = torch.full((2,), float(row)), row % 2
        return (inputs, label) if self.kind == "pair" else {"x": inputs, "label": torch.tensor(label)}


def test_labels_change_in_every_kind_of_data():
    labels = torch.tensor([1, 1, 0])
    inputs, old = torch.randn(3, 2), torch.tensor([0, 1, 0])
    pair = with_labels((inputs, old), labels)
    assert pair[0] is inputs
    assert pair[1].tolist() == [1, 1, 0]
    assert old.tolist() == [0, 1, 0]
    assert with_labels({"x": inputs, "y": old}, labels)["y"].tolist() == [1, 1, 0]
    binary = with_labels((inputs, torch.tensor([[0.0], [1.0], [0.0]])), labels)[1]
    assert binary.tolist() == [[1.0], [1.0], [0.0]]
    assert binary.dtype == torch.float32
    assert [with_labels(Named("pair"), labels)[row][1] for row in range(3)] == [1, 1, 0]
    assert [int(with_labels(Named("dict"), labels)[row]["label"]) for row in range(3)] == [1, 1, 0]
    loader = with_labels(DataLoader(Named("pair"), batch_size=2), labels)
    assert [batch[1].tolist() for batch in loader] == [[1, 1], [0]]


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(3, 2), torch.zeros(3, 4) + 0.5),
        (torch.zeros(3, 2), torch.zeros(3), torch.zeros(3)),
        {"x": torch.zeros(3), "answer": torch.zeros(3)},
    ],
)
def test_labels_that_are_not_known_are_refused(data):
    with pytest.raises(OptionError, match="wrong labels can be planted where"):
        with_labels(data, torch.tensor([1, 1, 0]))


def test_an_audit_keeps_its_calibration():
    found = calibration((0.9, 0.8), (1.0, 0.5))
    audit = made().calibrated(found)
    assert audit.calibration is found
    assert audit.is_issue.tolist() == [False, True, False, True, False]
    assert audit.cutoff.score == 0.9
