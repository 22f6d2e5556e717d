"""A study: everything that the commands need to know of a model, in one object, from one file.

A study file is a Python file that defines ``study() -> tracin.Study``. It runs as it would by
``python FILE.py``: it may import the files beside it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from tracin.checkpoints import Trajectory
from tracin.data import user_code
from tracin.errors import OptionError, StudyError, TracinError, UserCodeError
from tracin.tasks import Task

__all__ = ["Study", "load_study", "study_file"]

_INPUT_KEYS = ("inputs", "input", "x", "images", "image", "text")
_FEW = 12


@dataclass(frozen=True, eq=False)
class Study:
    """A model to trace: its task, its checkpoints, its data, and how to show a row.

    Args:
        task: Model and loss of each example.
        trajectory: The checkpoints.
        train: Training rows, as ``TracInCP`` takes them.
        test: The rows whose predictions are explained.
        class_names: The name of each class.
        fit: ``fit(train, folder, seed) -> Trajectory``: trains the model anew, for what needs a retraining.
        render: ``render(row)`` makes a row, as the dataset gives it, something to look at: a picture array
            (undoing a normalisation), a text, or a dict. A row of a tuple of tensors is the tuple of that row's
            tensors, of a dict a dict.
        read: ``read(value)`` makes the inputs of a row of something new, as ``render`` undoes it: of a picture array of
            bytes, H×W or H×W×3, in the size in which training rows are shown (scaling, normalising); of a text; or of a
            mapping. Without it the explorer takes new pictures where inputs are pictures of floats from 0 to 1.

    Raises:
        OptionError: An argument of another type.

    Example:
        >>> import tracin
        >>> model = torch.nn.Linear(2, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> rows = (torch.zeros(5, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
        >>> study = Study(task, trajectory, train=rows, test=rows, class_names=["red", "green", "blue"])
        >>> study.shown("train", 4)
        '0, 0'
    """

    task: Task
    trajectory: Trajectory
    train: Any
    test: Any
    class_names: Sequence[str] | None = None
    fit: Callable[[Any, Path, int], Trajectory] | None = None
    render: Callable[[Any], Any] | None = None
    read: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise OptionError(f"Study: task is a {type(self.task).__name__}. Give tracin.Task(model, loss).")
        if not isinstance(self.trajectory, Trajectory):
            raise OptionError(
                f"Study: trajectory is a {type(self.trajectory).__name__}. "
                "Give tracin.Trajectory.from_folder(folder), or tracin.Trajectory([checkpoint, ...])."
            )
        for name in ("fit", "render", "read"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"Study: {name} is a {type(value).__name__}, not a function.")
        if self.class_names is not None:
            object.__setattr__(self, "class_names", _names(self.class_names))

    def shown(self, side: Literal["train", "test"], row: int) -> Any:
        """What there is to see of a row: what ``render`` makes of it, else its inputs as picture or text.

        Args:
            side: Which rows.
            row: The row's position.

        Returns:
            A picture array, a text, or a mapping.

        Raises:
            OptionError: There is no such side.
        """
        if side not in ("train", "test"):
            raise OptionError(f"Study.shown: side is {side!r}. Choose 'train' or 'test'.")
        with user_code(f"the {side} dataset", [row]):
            value = row_of(self.train if side == "train" else self.test, row)
        if self.render is None:
            return _plain_look(value)
        with user_code("render", [row], f"the {side} rows"):
            return self.render(value)

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where it has none.

        Args:
            label: The class number.

        Returns:
            The name.
        """
        if self.class_names is None or not 0 <= label < len(self.class_names):
            return str(label)
        return self.class_names[label]


def _names(names: Any) -> tuple[str, ...]:
    if isinstance(names, str | bytes) or not hasattr(names, "__iter__") or isinstance(names, Mapping):
        raise OptionError(
            f"Study: class_names is a {type(names).__name__}. Give a list with the name of each class."
        )
    return tuple(str(name) for name in names)


def row_of(data: Any, row: int) -> Any:
    """One row, as the dataset gives it, before any batch is made of it."""
    if isinstance(data, DataLoader):
        return data.dataset[row]
    if isinstance(data, tuple | Mapping | Tensor):
        return pytree.tree_map(lambda leaf: torch.as_tensor(leaf)[row], data)
    return data[row]


def _plain_look(row: Any) -> Any:
    """The inputs of a row: a picture where the shape is that of one, else a short text."""
    if isinstance(row, Mapping):
        key = next((key for key in _INPUT_KEYS if key in row), None)
        return {str(key): _told(value) for key, value in row.items()} if key is None else _look(row[key])
    return _look(row[0]) if isinstance(row, tuple | list) and row else _look(row)


def _look(value: Any) -> Any:
    if hasattr(value, "__array__") and not isinstance(value, Tensor | np.generic):
        value = np.asarray(value)
    shape = tuple(getattr(value, "shape", ()))
    grey = len(shape) == 2 and min(shape) > 1
    colour = (
        len(shape) == 3 and min(sorted(shape)[1:]) > 1 and (shape[0] in (1, 3, 4) or shape[2] in (1, 3, 4))
    )
    return value if grey or colour else _told(value)


def _told(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim < 2 and len(value.reshape(-1)) <= _FEW:
            return ", ".join(f"{number:.4g}" for number in value.reshape(-1).tolist())
        return f"{type(value).__name__} of {' × '.join(map(str, value.shape))}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load_study(path: str | Path) -> Study:
    """The study of a file that defines ``study() -> tracin.Study``.

    Neither ``sys.path`` nor ``sys.modules`` keeps anything of the file or of its siblings. Functions of the study
    that import a sibling when they are called need ``study_file``.

    Args:
        path: The Python file.

    Returns:
        The study.

    Raises:
        StudyError: There is no such Python file, or it has no ``study()`` that returns a ``Study``.
        UserCodeError: The file, or ``study()``, raised an exception.
    """
    with study_file(path) as study:
        return study


@contextmanager
def study_file(path: str | Path) -> Iterator[Study]:
    """The study of a file; inside the block its module and its siblings can be imported.

    Args:
        path: The Python file.

    Yields:
        The study.

    Raises:
        StudyError: There is no such Python file, or it has no ``study()`` that returns a ``Study``.
    """
    file = _python_file(Path(path))
    with _importable(file) as (module, loader):
        with _raised_in(file, "the file"):
            loader.exec_module(module)
        function = getattr(module, "study", None)
        if not callable(function):
            found = "has no study()" if function is None else f"has a {type(function).__name__} called study"
            raise StudyError(f"{path} {found}. Define a function study() that returns a tracin.Study.")
        with _raised_in(file, "study()"):
            study = function()
        if not isinstance(study, Study):
            raise StudyError(
                f"study() in {path} returned a {type(study).__name__}. Return "
                "tracin.Study(task, trajectory, train, test)."
            )
        yield study


def _python_file(path: Path) -> Path:
    try:
        if path.is_dir():
            raise StudyError(f"{path} is a folder. Give the Python file that defines study().")
        if not path.exists():
            raise StudyError(f"{path} does not exist. Check the path; relative paths start at {Path.cwd()}.")
        if path.suffix != ".py":
            raise StudyError(f"{path} is not a Python file (.py). Give the file that defines study().")
        path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error}. Check its permissions.") from error
    return path.resolve()


@contextmanager
def _importable(file: Path) -> Iterator[tuple[ModuleType, Loader]]:
    """The file as a module not yet run, with its folder first on the path; all of it is undone afterwards."""
    name = f"tracin_study_{file.stem}"
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    folder, path, modules = str(file.parent), list(sys.path), set(sys.modules)
    before = sys.modules.get(name)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        yield module, spec.loader
    finally:
        sys.path[:] = path
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
        new = set(sys.modules) - modules if folder not in path else set()
        siblings = [module for module in new if _beside(module, file.parent)]
        for sibling in siblings:
            sys.modules.pop(sibling, None)


def _beside(name: str, folder: Path) -> bool:
    """Whether a module is one of the files or packages that lie in the folder itself."""
    top = sys.modules.get(name.partition(".")[0]) or sys.modules.get(name)
    places = [getattr(top, "__file__", None), *getattr(top, "__path__", ())]
    return any(
        place is not None
        and folder in (Path(place).parent, Path(place).parent.parent)
        and name.partition(".")[0] in (Path(place).stem, Path(place).name, Path(place).parent.name)
        for place in places
    )


@contextmanager
def _raised_in(file: Path, what: str) -> Iterator[None]:
    """Turn an exception of the user's file into a ``UserCodeError`` that names the line."""
    try:
        yield
    except (TracinError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{file}, line {line}" if line else str(file)
        told = " ".join(str(error).split())
        raise UserCodeError(
            f"{what} raised {type(error).__name__} at {place}{': ' if told else ''}{told}"
        ) from error
