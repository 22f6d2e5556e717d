"""Training data with other labels: a copy of the labels, never of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tracin.errors import OptionError
from tracin.shapes import Int

__all__ = ["with_labels"]

_TARGET_KEYS = ("targets", "labels", "label", "target", "y")


class _Relabelled(Dataset):
    """A map-style dataset whose rows have other labels."""

    def __init__(self, dataset: Any, labels: Int[Tensor, " n"]) -> None:
        self._dataset, self._labels = dataset, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Any:
        return _replaced(self._dataset[row], self._labels[row])


def with_labels(data: Any, labels: Int[Tensor, " n"]) -> Any:
    """The same rows with other labels.

    Args:
        data: A pair (inputs, labels) or a dict with a key for labels, of tensors; a dataset of such rows; or a loader of one.
        labels: The class of each row.

    Returns:
        Data of the same kind; what was given stays as it is.

    Raises:
        OptionError: It is not known where the labels are.

    Example:
        >>> with_labels((torch.zeros(2, 3), torch.tensor([0, 1])), torch.tensor([1, 1]))[1]
        tensor([1, 1])
    """
    if isinstance(data, DataLoader):
        return DataLoader(
            _Relabelled(data.dataset, labels), batch_size=data.batch_size, collate_fn=data.collate_fn
        )
    if isinstance(data, tuple | list | Mapping):
        return _replaced(data, labels)
    return _Relabelled(data, labels)


def _replaced(row: Any, label: Tensor) -> Any:
    if isinstance(row, tuple | list) and len(row) == 2 and _is_class(row[1]):
        return (row[0], _like(row[1], label))
    if isinstance(row, Mapping):
        key = next((key for key in _TARGET_KEYS if key in row), None)
        if key is not None and _is_class(row[key]):
            return {**row, key: _like(row[key], label)}
    raise OptionError(
        "wrong labels can be planted where a row is (inputs, class number), or a dict with the class number under "
        f"{', '.join(_TARGET_KEYS)}; this one is a {type(row).__name__}. Give the training rows in such a form."
    )


def _is_class(value: Any) -> bool:
    """Whole numbers, or the 0.0 and 1.0 of a binary target; no probabilities of classes."""
    values = torch.as_tensor(value)
    plain = values.dim() <= 1 or values.shape[1:].numel() == 1
    return plain and (not values.is_floating_point() or bool((values == values.round()).all()))


def _like(old: Any, label: Tensor) -> Any:
    if isinstance(old, Tensor):
        return label.to(old.device, old.dtype).reshape(old.shape)
    return (
        int(label)
        if label.dim() == 0
        else type(old)(label.tolist())
        if isinstance(old, list)
        else label.numpy()
    )
