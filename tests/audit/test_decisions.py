"""Decisions, and what they leave of the training set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from audit.common import made
from tracin.audit import Decision
from tracin.errors import OptionError


def test_apply_gives_the_rows_that_stay_and_their_labels():
    cleaned = made().apply({1: ("relabel", "fly"), 4: "remove", 0: "keep", 3: ("relabel", 1)})
    assert cleaned.rows.tolist() == [0, 1, 2, 3]
    assert cleaned.labels.tolist() == [0, 2, 2, 1]
    assert cleaned.labels.dtype == torch.int64
    assert (cleaned.removed, cleaned.relabelled, cleaned.kept) == ((4,), (1, 3), (0,))


def test_both_forms_are_the_same_and_the_audit_stays():
    audit = made()
    one = audit.apply({1: ("relabel", "fly"), 4: "remove"})
    other = audit.apply([Decision(4, "remove"), Decision(1, "relabel", 2)])
    third = audit.apply({np.int64(1): ("relabel", np.int64(2)), torch.tensor(4): "remove"})
    assert one.labels.tolist() == other.labels.tolist()
    assert one.rows.tolist() == other.rows.tolist() == third.rows.tolist()
    assert third.labels.tolist() == one.labels.tolist()
    assert audit.given_labels.tolist() == [0, 1, 2, 0, 1]
    assert audit.apply({}).rows.tolist() == [0, 1, 2, 3, 4]


@given(st.dictionaries(st.integers(0, 4), st.sampled_from(["keep", "remove", 0, 1, 2])))
def test_whatever_is_decided(told):
    decisions = {row: ("relabel", what) if isinstance(what, int) else what for row, what in told.items()}
    cleaned = made().apply(decisions)
    labels = dict(zip(cleaned.rows.tolist(), cleaned.labels.tolist(), strict=True))
    for row, given_label in enumerate([0, 1, 2, 0, 1]):
        what = told.get(row, "keep")
        if what == "remove":
            assert row not in labels
        else:
            assert labels[row] == (given_label if what == "keep" else what)


@pytest.mark.parametrize(
    ("decisions", "fact"),
    [
        ({5: "keep"}, "row 5 does not exist: the 5 rows count from 0 to 4"),
        ({-1: "keep"}, "row -1"),
        ({"1": "keep"}, "row '1' does not exist"),
        ({True: "keep"}, "row True"),
        ({1.0: "keep"}, r"row 1\.0"),
        ({1: "burn"}, "row 1: the action is 'burn'. Choose one of keep, relabel, remove"),
        ({1: ("relabel", "wasp")}, "row 1: 'wasp' is no class. Give ant, bee, fly, or a number from 0 to 2"),
        ({1: ("relabel", 3)}, "row 1: 3 is no class"),
        ({1: ("relabel", -1)}, "row 1: -1 is no class"),
        ({1: ("relabel", True)}, "row 1: True is no class"),
        ({1: "relabel"}, "row 1: relabel needs a label"),
        ({1: ("keep", "bee")}, "row 1: keep takes no label, got 'bee'"),
        ({1: None}, "decisions\\[1\\] is None"),
        ([Decision(1, "keep"), Decision(1, "remove")], "row 1 is decided twice"),
        ([(1, "keep")], "holds a tuple"),
        ("keep", "decisions is a str"),
        ({1: Decision(2, "keep")}, "decisions\\[1\\] is a decision on row 2"),
    ],
)
def test_what_does_not_fit_is_named(decisions, fact):
    with pytest.raises(OptionError, match=fact):
        made().apply(decisions)


def test_a_target_is_a_finite_number():
    audit = made(
        classes=None,
        class_names=None,
        given_labels=torch.arange(5).double(),
        suggested_labels=torch.ones(5).double(),
    )
    assert audit.apply({2: ("relabel", 0.5), 3: ("relabel", 7)}).labels.tolist() == [0.0, 1.0, 0.5, 7.0, 4.0]
    for wrong in ("high", float("nan"), True):
        with pytest.raises(OptionError, match="row 2: the target"):
            audit.apply({2: ("relabel", wrong)})


def test_without_labels_rows_go_and_nothing_is_relabelled():
    audit = made(classes=None, class_names=None, given_labels=None, suggested_labels=None)
    assert {decision.action for decision in audit.suggested()} == {"remove"}
    cleaned = audit.apply(audit.suggested())
    assert cleaned.rows.tolist() == [0, 4]
    assert cleaned.labels is None
    with pytest.raises(OptionError, match="row 1: the task has no labels that could be changed"):
        audit.apply({1: ("relabel", 1)})
    with pytest.raises(OptionError, match="no suggested label"):
        audit.suggested(1, "relabel")


def test_a_text_is_a_name_and_a_number_a_number():
    audit = made(class_names=("2", "1", "0"))
    assert audit.apply({0: ("relabel", "2"), 2: ("relabel", 1)}).labels.tolist() == [0, 1, 1, 0, 1]
    assert audit.apply({0: ("relabel", 2)}).labels.tolist() == [2, 1, 2, 0, 1]
    with pytest.raises(OptionError, match="row 0: '3' is no class"):
        audit.apply({0: ("relabel", "3")})
    with pytest.raises(OptionError, match="row 0: '1' is no class"):
        made(class_names=None).apply({0: ("relabel", "1")})


def test_names_that_occur_twice_get_their_number():
    audit = made(class_names=("cat", "dog", "cat"))
    assert audit.class_names == ("cat (0)", "dog", "cat (2)")
    assert audit.apply({0: ("relabel", "cat (2)")}).labels.tolist() == [2, 1, 2, 0, 1]
    with pytest.raises(OptionError, match=r"'cat' is no class. Give cat \(0\), dog, cat \(2\)"):
        audit.apply({0: ("relabel", "cat")})


@pytest.mark.parametrize("number", [10**40, 10**400, -(10**5000)], ids=["40", "400", "-5000"])
def test_numbers_beyond_all_floats_are_refused(number):
    with pytest.raises(OptionError, match=r"row 1: a number of \d+ bits is no class"):
        made().apply({1: ("relabel", number)})
    with pytest.raises(OptionError, match=r"row a number of \d+ bits does not exist"):
        made().apply({number: "keep"})
    targets = made(classes=None, class_names=None, given_labels=torch.ones(5).double())
    if number > 10**308 or number < 0:
        with pytest.raises(OptionError, match=r"row 1: the target a number of \d+ bits is no finite number"):
            targets.apply({1: ("relabel", number)})
    else:
        assert float(targets.apply({1: ("relabel", number)}).labels[1]) == 1e40


def test_suggestions_are_the_flagged_rows_by_suspicion():
    audit = made()
    assert audit.order.tolist() == [1, 3, 2, 4, 0]
    assert [(d.row, d.action, d.label) for d in audit.suggested()] == [
        (1, "relabel", "fly"),
        (3, "relabel", "fly"),
        (2, "relabel", "ant"),
    ]
    assert [d.row for d in audit.suggested(1)] == [1]
    assert [d.row for d in audit.suggested(5, "remove")] == [1, 3, 2, 4, 0]
    unflagged_first = made(is_issue=torch.tensor([False, False, True, False, False]))
    assert [d.row for d in unflagged_first.suggested(2)] == [2, 1]
    assert audit.apply(audit.suggested()).labels.tolist() == [0, 2, 0, 2, 1]


def test_a_regression_suggests_to_remove():
    audit = made(classes=None, class_names=None, given_labels=torch.ones(5).double())
    assert {d.action for d in audit.suggested()} == {"remove"}


@pytest.mark.parametrize(
    ("k", "action", "fact"),
    [(6, None, "k is 6"), (-1, None, "k is -1"), (True, None, "k is True"), (1, "eat", "'eat'")],
)
def test_suggestions_out_of_range(k, action, fact):
    with pytest.raises(OptionError, match=fact):
        made().suggested(k, action)


def test_nothing_to_relabel_to():
    with pytest.raises(OptionError, match="no suggested label"):
        made(suggested_labels=None).suggested(1, "relabel")


def test_opposing_rows_come_strongest_first():
    values = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    audit = made(signals={"opposes_validation": values})
    assert audit.opposing().tolist() == [2, 0, 4]
    assert audit.opposing(1).tolist() == [2]
    with pytest.raises(OptionError, match="opposing: k is 0"):
        audit.opposing(0)
    with pytest.raises(OptionError, match="no validation set"):
        made().opposing()
