"""Wrong labels planted on purpose: the known answer against which a ranking of suspects is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.options import whole_number
from tracin.shapes import Bool, Float, Int

__all__ = ["Flips", "plant_flips", "plant_hardest_flips"]


class Flips(NamedTuple):
    """The labels with their flips, and which rows were flipped."""

    labels: Int[Tensor, " n"]
    mask: Bool[Tensor, " n"]


def plant_flips(
    labels: Tensor | np.ndarray | Sequence[int],
    fraction: float = 0.1,
    *,
    classes: int | None = None,
    seed: int = 0,
) -> Flips:
    """Give ``round(fraction · n)`` rows a wrong label, drawn uniformly from the other classes.

    The rows are drawn without replacement. Neither torch's nor NumPy's global random state is read or
    moved, and the labels passed in stay as they are.

    Args:
        labels: The true classes [n], whole numbers.
        fraction: The share of rows to flip, strictly between 0 and 1.
        classes: The number of classes; then labels run from 0 to ``classes - 1``. By default the
            classes are the distinct values that occur.
        seed: Same seed, same flips.

    Returns:
        The new labels [n] (int64, CPU) and the mask [n] of the flipped rows.

    Raises:
        OptionError: ``fraction`` outside (0, 1) or too small to flip a row; ``classes`` below 2.
        DataError: Labels that aren't one whole number per row, or of one class only, or out of range.

    Example:
        >>> flips = plant_flips([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], fraction=0.3, seed=7)
        >>> int(flips.mask.sum())
        3
        >>> true = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
        >>> bool((flips.labels != true).equal(flips.mask))
        True
    """
    true = whole_numbers(labels)
    count = flip_count(true.shape[0], fraction)
    values = class_values(true, classes)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(true.shape[0], generator=generator)[:count]
    shift = torch.randint(1, values.shape[0], (count,), generator=generator)
    flipped = true.clone()
    flipped[rows] = values[(torch.searchsorted(values, true[rows]) + shift) % values.shape[0]]
    mask = torch.zeros(true.shape[0], dtype=torch.bool)
    mask[rows] = True
    return Flips(flipped, mask)


def plant_hardest_flips(
    labels: Tensor | np.ndarray | Sequence[int],
    logits: Tensor | np.ndarray | Sequence[Sequence[float]],
    fraction: float = 0.1,
    *,
    seed: int = 0,
) -> Flips:
    """Give ``round(fraction · n)`` rows the wrong class that a model of the true labels finds most likely.

    Such flips are the hardest to find: the wrong label is the one that the row looks most like (Pruthi et al.
    2020, section 4.1). The rows are drawn as ``plant_flips`` draws them, so that both flip the same rows under the
    same seed; only the new labels differ.

    Args:
        labels: The true classes [n], whole numbers from 0 to C − 1.
        logits: What a model that was trained on the true labels says of the same rows [n, C]; probabilities do too.
        fraction: The share of rows to flip, strictly between 0 and 1.
        seed: Same seed, same rows.

    Returns:
        The new labels [n] (int64, CPU) and the mask [n] of the flipped rows. Of equally likely classes the lowest.

    Raises:
        OptionError: ``fraction`` outside (0, 1) or too small to flip a row.
        DataError: Labels that aren't one class per row, or logits that aren't [n, C] of the same rows.
        NotFiniteError: A logit that is NaN or infinite; the row is named.

    Example:
        >>> logits = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 1.0], [2.0, 1.0, 4.0], [4.0, 3.0, 1.0]])
        >>> plant_hardest_flips([0, 1, 2, 0], logits, fraction=0.99).labels
        tensor([2, 2, 0, 1])
    """
    true = whole_numbers(labels)
    count = flip_count(true.shape[0], fraction)
    wrong = strongest_wrong_classes(true, logits)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(true.shape[0], dtype=torch.bool)
    mask[torch.randperm(true.shape[0], generator=generator)[:count]] = True
    return Flips(torch.where(mask, wrong, true), mask)


def strongest_wrong_classes(
    labels: Int[Tensor, " n"], logits: Tensor | np.ndarray | Sequence[Sequence[float]]
) -> Int[Tensor, " n"]:
    """The class with the largest logit among those that aren't the label; of equal ones the lowest."""
    values = _finite_logits(logits, labels.shape[0])
    class_values(labels, values.shape[1])
    others = values.scatter(1, labels[:, None], -torch.inf)
    return (others == others.amax(1, keepdim=True)).int().argmax(1)


def _finite_logits(
    logits: Tensor | np.ndarray | Sequence[Sequence[float]], rows: int
) -> Float[Tensor, "n C"]:
    try:
        values = torch.as_tensor(logits).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(f"logits must be numbers [n, C]: {error}") from error
    if values.ndim != 2 or values.shape[0] != rows or values.shape[1] < 2:
        raise DataError(
            f"{rows} labels and logits of shape {list(values.shape)}: give the logits [n, C] of the same rows in the same "
            "order, one column per class"
        )
    values = values.to(torch.float64)
    finite = values.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NotFiniteError(
            f"row {row} has the logits {values[row].tolist()}; the wrong class needs finite ones"
        )
    return values


def whole_numbers(labels: Tensor | np.ndarray | Sequence[int]) -> Int[Tensor, " n"]:
    """The labels as an int64 vector on the CPU; anything else is a DataError."""
    try:
        vector = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(f"labels must be whole numbers to be flipped: {error}") from error
    if vector.ndim != 1 or vector.shape[0] == 0:
        raise DataError(f"labels must hold one class per row, got the shape {tuple(vector.shape)}")
    if vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool:
        raise DataError(
            f"labels must be whole numbers to be flipped, got {vector.dtype}; convert them to int64"
        )
    return vector.to(torch.int64)


def flip_count(rows: int, fraction: float) -> int:
    if not 0.0 < fraction < 1.0:
        raise OptionError(
            f"fraction is the share of rows to flip, between 0 and 1 (both excluded), got {fraction}"
        )
    count = round(fraction * rows)
    if count == 0:
        raise OptionError(f"fraction {fraction} of {rows} rows flips none; take at least {1 / rows:.3g}")
    return count


def class_values(labels: Int[Tensor, " n"], classes: int | None) -> Int[Tensor, " C"]:
    if classes is None:
        values = labels.unique()
        if values.shape[0] < 2:
            raise DataError(
                f"every row has the label {int(values[0])}; name the number of classes to flip to another"
            )
        return values
    classes = whole_number(classes, "classes", 2, why=", as a flip needs another class")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise DataError(f"row {row} has the label {int(labels[row])}, outside 0 to {classes - 1}")
    return torch.arange(classes)
