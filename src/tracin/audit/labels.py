"""Labels as the training rows have them: read once, and given back in their dtype and shape after decisions."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from tracin.audit.parts import Findings
from tracin.data import open_rows
from tracin.errors import DataError, OptionError
from tracin.methods import TracInCP
from tracin.shapes import Int, Shaped
from tracin.tasks import losses
from tracin.tasks.losses import split_batch

__all__ = ["HELD", "labels_of", "put", "unchangeable"]

HELD = 256 << 20
"""The most bytes of targets that an audit of a task without classes keeps."""

_READY = (losses.cross_entropy, losses.binary_cross_entropy, losses.mean_squared_error)


def labels_of(method: TracInCP, train: Any, given: Tensor | None, classes: int | None) -> Tensor | None:
    """The labels of the rows, in the dtype and shape that the batches have them in.

    Args:
        method: Task and settings.
        train: The rows.
        given: The given classes or targets, one number per row [n].
        classes: The number of classes.

    Returns:
        Labels [n, ...]; None where ``given`` is the same, or where it is not known which part of a batch they are: under a
        loss of one's own, unless they are the class numbers, or the probabilities whose largest is that of the class; and
        where targets of a task without classes take more than ``HELD`` bytes.
    """
    task = method.task
    ready = task.loss in _READY and task.outputs is getattr(task.loss, "outputs", None)
    if given is None and not ready:
        return None
    found = _read(method, train, None if classes is not None else HELD)
    if found is None or (given is not None and _same(found, given)):
        return None
    if ready or (given is not None and classes is not None and _tells(found, given, classes)):
        return found
    return None


def _read(method: TracInCP, train: Any, most: int | None) -> Tensor | None:
    settings = method.settings
    parts: list[Tensor] = []
    held = 0
    with closing(
        open_rows(train, name="train", batch_size=settings.batch_size, collate=settings.collate)
    ) as rows:
        for batch in rows.batches():
            try:
                _, wanted = split_batch(batch.value)
            except DataError:
                return None
            if not isinstance(wanted, Tensor) or wanted.shape[:1] != (batch.size,):
                return None
            held += wanted.nbytes
            if wanted.is_complex() or (most is not None and held > most):
                return None
            parts.append(wanted.detach().cpu())
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1:
        return None
    return torch.cat(parts)


def _same(labels: Tensor, given: Tensor) -> bool:
    return labels.dtype == given.dtype and torch.equal(labels, given)


def _numbers(labels: Tensor, given: Tensor) -> bool:
    """Whether labels hold the class numbers."""
    return labels.numel() == len(given) and torch.equal(labels.reshape(-1).double(), given.double())


def _tells(labels: Tensor, given: Int[Tensor, " n"], classes: int) -> bool:
    """Whether labels hold the class numbers or probabilities of the classes."""
    probable = tuple(labels.shape) == (len(given), classes) and labels.is_floating_point()
    return _numbers(labels, given) or (probable and torch.equal(labels.argmax(1), given))


def _one_hot(labels: Tensor, given: Int[Tensor, " n"], classes: int) -> bool:
    if tuple(labels.shape) != (len(given), classes):
        return False
    return torch.equal(torch.nn.functional.one_hot(given, classes).to(labels.dtype), labels)


def unchangeable(findings: Findings) -> str | None:
    """Why no label can be changed, with what to do in place of it; None where labels can be.

    Args:
        findings: The audit.

    Returns:
        A sentence.
    """
    given, classes = findings.given_labels, findings.classes
    if given is None:
        return "the task has no labels that could be changed. Choose keep or remove."
    labels = given if findings.labels is None else findings.labels
    if classes is None:
        return None
    told = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    if not _numbers(labels, given) and not _one_hot(labels, given, classes):
        return (
            f"the labels ({told}) are probabilities, and a class does not say what becomes of them. Choose keep or remove, or "
            "change the labels yourself at the rows of the decisions; audit.suggested_labels has the classes."
        )
    if _numbers(labels, given) and classes - 1 > _largest(labels.dtype):
        return f"the labels ({told}) have no room for class {classes - 1}. Give labels of int64."
    return None


def _largest(dtype: torch.dtype) -> int:
    """The number up to which a dtype has all whole numbers."""
    if dtype == torch.bool:
        return 1
    return int(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else torch.iinfo(dtype).max


def put(labels: Shaped[Tensor, "n ..."], row: int, label: float, classes: int | None) -> None:
    """Change the label of a row in place.

    Args:
        labels: Labels that are not ``unchangeable``.
        row: The row.
        label: The class number, or the target.
        classes: The number of classes.

    Raises:
        OptionError: The target does not fit into the dtype.
    """
    if classes is not None and labels[row].numel() > 1:
        labels[row] = 0
        labels[row, int(label)] = 1
        return
    value = torch.tensor(label, dtype=torch.float64).to(labels.dtype)
    exact = labels.is_floating_point() or value.item() == label
    if not exact or not bool(torch.isfinite(value)):
        raise OptionError(
            f"row {row}: the target {label!r} does not fit {str(labels.dtype).removeprefix('torch.')}, which the targets are. "
            "Give one that does, or targets of float64."
        )
    labels[row] = value
