"""A design refuses what cannot be run, and survives JSON."""

from __future__ import annotations

import pytest

from tracin.errors import OptionError, ResultError
from tracin.evaluation.mislabelled import Design


def design(**changes):
    return Design(**{"data": "digits", "methods": ("tracin", "loss"), **changes})


def test_what_is_not_said_suits_the_data():
    assert design().model == "cnn"
    assert design().schedules == ("constant", "cosine")
    assert design(data="mnist").epochs == 12
    assert design(data="mnist", model="resnet").epochs == 8
    assert design().epochs == 36


def test_cells_come_seed_by_seed():
    keys = design(flips=("random", "hardest"), seeds=2, schedules=("step",)).cells
    assert [key.name for key in keys] == [
        "random-step-0",
        "hardest-step-0",
        "random-step-1",
        "hardest-step-1",
    ]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.0}, "fraction=1.0"),
        ({"fraction": float("nan")}, "fraction=nan"),
        ({"seeds": 0}, "seeds=0"),
        ({"rows": 0}, "rows=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"checkpoints": 0}, "checkpoints=0"),
        ({"batch": 1}, "batch=1"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": float("inf")}, "rate=inf"),
        ({"repair": (0.0, 0.1)}, "repair=0.0"),
        ({"repair": (1.5,)}, "repair=1.5"),
        ({"data": "letters"}, "'letters' is not known"),
        ({"model": "vit"}, "'vit' is not known"),
        ({"flips": ()}, "flips is empty"),
        ({"flips": ("worst",)}, "'worst' is not known"),
        ({"schedules": ("linear",)}, "'linear' is not known"),
        ({"data": "mine.py", "model": "cnn"}, "model=cnn does not apply to mine.py"),
        ({"data": "mine.py", "epochs": 3}, "epochs=3 does not apply to mine.py"),
        ({"data": "mine.py", "schedules": ("cosine",)}, "schedules=cosine does not apply to mine.py"),
    ],
)
def test_a_value_out_of_range(changes, fact):
    with pytest.raises(OptionError) as caught:
        design(**changes)
    assert fact in str(caught.value)


def test_messages_name_arguments_not_flags():
    for changes in ({"fraction": 2.0}, {"flips": ("worst",)}, {"data": "mine.py", "model": "cnn"}):
        with pytest.raises(OptionError) as caught:
            design(**changes)
        assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"data": "mine.py"}, {"repair": (0.1, 0.2), "rows": 50, "data_folder": "x"}]
)
def test_json_and_back(changes):
    one = design(**changes)
    assert Design.from_json(one.to_json()) == one


def test_what_a_cell_of_built_in_data_depends_on_keeps_its_form():
    """Finished cells of before are of the same study only as long as this stays."""
    assert design(rows=50, seeds=2, rate=0.1).basis("abc") == {
        "data": "digits",
        "model": "cnn",
        "fraction": 0.1,
        "epochs": 36,
        "checkpoints": 8,
        "rate": 0.1,
        "batch": 64,
        "digest": "abc",
    }
    assert design(data="mine.py").basis("abc", "def") == {
        "data": "mine.py",
        "model": "own",
        "fraction": 0.1,
        "digest": "abc",
        "file": "def",
    }


def test_json_of_something_else():
    values = design().to_json()
    with pytest.raises(ResultError, match="colour"):
        Design.from_json({**values, "colour": "red"})
    del values["rate"]
    with pytest.raises(ResultError, match="rate"):
        Design.from_json(values)
