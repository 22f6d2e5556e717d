"""Study files: what they may do, what is refused, and that nothing of them stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tracin
from tracin.errors import CheckpointError, OptionError, StudyError, UserCodeError
from tracin.study import Study, load_study, study_file

FILE = """
from __future__ import annotations

from dataclasses import dataclass

import torch
import tracin
from tracin.study import Study
{imports}


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1


def study() -> Study:
    model = torch.nn.Linear(2, 3)
    rows = (torch.zeros(5, 2), torch.tensor([0, 1, 2, 0, 1]))
    checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=Settings().rate)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    return Study(task, tracin.Trajectory([checkpoint]), rows, rows, class_names={names})
"""


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def good(folder: Path, imports: str = "", names: str = "['a', 'b', 'c']") -> Path:
    return write(folder, FILE.format(imports=imports, names=names))


def test_a_study_file_is_loaded_and_leaves_nothing(tmp_path):
    path, modules = list(sys.path), set(sys.modules)
    study = load_study(good(tmp_path))
    assert isinstance(study, Study)
    assert study.class_names == ("a", "b", "c")
    assert sys.path == path
    assert set(sys.modules) == modules


def test_siblings_are_imported_and_forgotten(tmp_path):
    """Two folders with files of one name: each study gets its own."""
    modules = set(sys.modules)
    for number in (1, 2):
        folder = tmp_path / str(number)
        write(folder, f"NAMES = ['sibling {number}']", "sibling_of_study.py")
        write(folder / "package_of_study", "")
        write(folder / "package_of_study", "from sibling_of_study import NAMES", "__init__.py")
        write(folder / "package_of_study", f"MORE = ['deep {number}']", "deep.py")
        imports = "from package_of_study import NAMES\nfrom package_of_study.deep import MORE"
        study = load_study(good(folder, imports, "NAMES + MORE"))
        assert study.class_names == (f"sibling {number}", f"deep {number}")
    assert set(sys.modules) == modules


def test_what_else_a_file_imports_stays(tmp_path):
    sys.modules.pop("this_is_elsewhere", None)
    elsewhere = write(tmp_path / "elsewhere", "", "this_is_elsewhere.py").parent
    sys.path.append(str(elsewhere))
    try:
        load_study(good(tmp_path / "study", "import this_is_elsewhere"))
        assert "this_is_elsewhere" in sys.modules
    finally:
        sys.path.remove(str(elsewhere))
        sys.modules.pop("this_is_elsewhere", None)


def test_siblings_can_be_imported_late_inside_the_block(tmp_path):
    write(tmp_path, "NAME = 'late'", "late_sibling.py")
    text = FILE.format(imports="", names="None").replace(
        "class_names=None", "render=lambda row: __import__('late_sibling').NAME"
    )
    with study_file(write(tmp_path, text)) as study:
        assert study.shown("train", 0) == "late"
    assert "late_sibling" not in sys.modules


def test_the_path_is_put_back_after_an_error(tmp_path):
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises(UserCodeError):
        load_study(write(tmp_path, "import sys\nsys.path.append('junk')\nraise ValueError"))
    assert sys.path == path
    assert set(sys.modules) == modules


BAD = {
    "no_study": ("x = 1", StudyError, ["has no study()", "mine.py", "Define"]),
    "no_function": ("study = 3", StudyError, ["int called study"]),
    "other_type": ("def study():\n    return {}", StudyError, ["returned a dict", "tracin.Study("]),
    "nothing": ("def study():\n    pass", StudyError, ["returned a NoneType"]),
    "raises": (
        "x = 1\nraise ValueError('the\\nreason')",
        UserCodeError,
        ["ValueError", "line 2", "the reason"],
    ),
    "raises_inside": (
        "def study():\n    return [][1]",
        UserCodeError,
        ["study() raised IndexError", "line 2"],
    ),
    "syntax": ("def study(:\n    pass", UserCodeError, ["SyntaxError", "line 1"]),
    "exits": ("import sys\nsys.exit(0)", UserCodeError, ["SystemExit", "line 2"]),
    "arguments": ("def study(folder):\n    pass", UserCodeError, ["TypeError", "folder"]),
    "import": (
        "import no_such_module_at_all",
        UserCodeError,
        ["ModuleNotFoundError", "no_such_module_at_all"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_study(tmp_path, name):
    text, error, facts = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(error) as caught:
        load_study(path)
    assert [fact for fact in facts if fact not in str(caught.value)] == []
    assert str(path) in str(caught.value)
    if error is UserCodeError:
        assert caught.value.__cause__ is not None


def test_our_own_errors_come_through(tmp_path):
    text = "import tracin\ndef study():\n    tracin.Trajectory.from_folder('nowhere-at-all')"
    with pytest.raises(CheckpointError, match="nowhere-at-all"):
        load_study(write(tmp_path, text))


def test_what_is_no_python_file(tmp_path):
    with pytest.raises(StudyError, match=r"missing\.py does not exist"):
        load_study(tmp_path / "missing.py")
    with pytest.raises(StudyError, match="is a folder"):
        load_study(tmp_path)
    with pytest.raises(StudyError, match="not a Python file"):
        load_study(write(tmp_path, "text", "notes.txt"))


def study_of(train, **options) -> Study:
    model = nn.Linear(2, 3)
    checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=0.1)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    return Study(task, tracin.Trajectory([checkpoint]), train, train, **options)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"task": 1}, "task is a int"),
        ({"trajectory": []}, "trajectory is a list"),
        ({"render": "picture"}, "render is a str"),
        ({"read": 3}, "read is a int"),
        ({"fit": 3}, "fit is a int"),
        ({"class_names": "abc"}, "class_names is a str"),
        ({"class_names": {"a": 1}}, "class_names is a dict"),
    ],
)
def test_arguments_of_another_type(options, fact):
    ready = study_of((torch.zeros(2, 2), torch.zeros(2)))
    given = {name: getattr(ready, name) for name in ("task", "trajectory", "train", "test")} | options
    # Not by the constructor: the type checker of the tests would be faster.
    study = object.__new__(Study)
    for name, value in ({"class_names": None, "fit": None, "render": None} | given).items():
        object.__setattr__(study, name, value)
    with pytest.raises(OptionError, match=fact):
        study.__post_init__()


class Words(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, row):
        return {"text": f"word {row}", "label": row}


def test_render_gets_a_row_as_the_data_has_it():
    seen = []
    pictures, labels = torch.arange(24.0).reshape(3, 1, 2, 4), torch.tensor([5, 6, 7])
    sources = [
        (pictures, labels),
        {"images": pictures, "labels": labels},
        Words(),
        DataLoader(Words(), batch_size=2),
        [("a", 1), ("b", 2), ("c", 3)],
        (pictures.numpy(), labels.numpy()),
    ]
    for data in sources:
        study_of(data, render=seen.append).shown("train", 2)
    assert torch.equal(seen[0][0], pictures[2])
    assert seen[0][1] == 7
    assert torch.equal(seen[1]["images"], pictures[2])
    assert seen[1]["labels"] == 7
    assert seen[2] == seen[3] == {"text": "word 2", "label": 2}
    assert seen[4] == ("c", 3)
    assert torch.equal(torch.as_tensor(seen[5][0]), pictures[2])


def test_without_render_the_inputs_are_shown():
    def shown(row):
        return study_of([row]).shown("test", 0)

    picture = torch.zeros(3, 4, 5)
    assert shown((picture, 1)) is picture
    assert shown({"image": picture, "label": 1}) is picture
    assert shown((np.zeros((4, 4)), 1)).shape == (4, 4)
    assert shown((torch.tensor([1.0, 0.25]), 1)) == "1, 0.25"
    assert shown((torch.zeros(50), 1)) == "Tensor of 50"
    assert shown((torch.zeros(5, 6, 7), 1)) == "Tensor of 5 × 6 × 7"
    assert shown(("some words", 1)) == "some words"
    assert shown({"age": 3.14159, "sex": "f"}) == {"age": "3.142", "sex": "f"}


def test_an_error_in_render_names_the_row():
    study = study_of((torch.zeros(4, 2), torch.zeros(4)), render=lambda row: row["picture"])
    with pytest.raises(UserCodeError, match=r"render raised .* on row 3"):
        study.shown("train", 3)


def test_class_names_beyond_the_list_are_numbers():
    study = study_of((torch.zeros(2, 2), torch.zeros(2)), class_names=["a", "5"])
    assert [study.class_name(label) for label in (0, 1, 2, -1)] == ["a", "5", "2", "-1"]
    assert study_of((torch.zeros(2, 2), torch.zeros(2))).class_name(4) == "4"
