"""What models that did not see a row think of its label (Northcutt, Jiang and Chuang 2021), scored by cleanlab.

Axis letters: n rows · C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tracin.data import user_code
from tracin.errors import DataError, MissingExtraError, OptionError
from tracin.evaluation.flips import whole_numbers
from tracin.options import whole_number
from tracin.shapes import Float, Int

__all__ = ["out_of_fold", "self_confidence", "stratified_folds"]

Fit = Callable[[Tensor], Any]


def self_confidence(
    labels: Tensor,
    probabilities: Tensor | None = None,
    *,
    fit: Fit | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[Tensor, " n"]:
    r"""1 − the probability of the label, from a model that was not trained on the row (cleanlab's *self-confidence*).

    Args:
        labels: The class of each row [n], from 0 to C − 1.
        probabilities: Out-of-fold probabilities [n, C].
        fit: Instead: ``fit(rows)`` trains a model on these rows alone and returns the probabilities of all rows [n, C], of
            which only those of the other rows are used. It is called once per fold.
        folds: With ``fit``: how many folds.
        seed: With ``fit``: which rows go together.

    Returns:
        Suspicions [n] from 0 to 1, float64.

    Raises:
        OptionError: Both or neither of ``probabilities`` and ``fit``; fewer than 2 folds, or more than rows.
        DataError: Probabilities of another shape, outside [0, 1], or that do not add up to 1; one class only.
        MissingExtraError: cleanlab is not installed.
    """
    rank = _cleanlab()
    if (probabilities is None) == (fit is None):
        raise OptionError(
            "self_confidence: give out-of-fold probabilities, or fit= to make them, one of the two."
        )
    given = whole_numbers(labels)
    if len(given.unique()) < 2:
        raise DataError(f"every row has the label {int(given[0])}: there is nothing to confuse it with.")
    if fit is not None:
        probabilities = out_of_fold(given, fit, folds=folds, seed=seed)
    values = _checked(probabilities, given, "probabilities")
    quality = rank.get_label_quality_scores(given.numpy(), values.numpy(), method="self_confidence")
    return 1.0 - torch.as_tensor(quality, dtype=torch.float64)


def out_of_fold(labels: Tensor, fit: Fit, *, folds: int = 5, seed: int = 0) -> Float[Tensor, "n C"]:
    """Probabilities of every row from a model that was trained on the other folds.

    Args:
        labels: The class of each row [n].
        fit: ``fit(rows)`` trains on these rows, positions in ascending order, and returns the probabilities of all rows
            [n, C].
        folds: How many folds.
        seed: Which rows go together.

    Returns:
        The probabilities [n, C], float64.

    Raises:
        OptionError: Fewer than 2 folds, or more than rows.
        DataError: ``fit`` returned something else, or a class has one row.
        UserCodeError: ``fit`` fails.

    Example:
        >>> labels = torch.tensor([0, 1] * 5)
        >>> def fit(rows):
        ...     shares = torch.bincount(labels[rows], minlength=2) / len(rows)
        ...     return shares.expand(len(labels), 2)
        >>> out_of_fold(labels, fit).shape
        torch.Size([10, 2])
    """
    given = whole_numbers(labels)
    assigned = stratified_folds(given, folds=folds, seed=seed)
    folds = int(folds)
    result: Tensor | None = None
    for fold in range(folds):
        train, held_out = (assigned != fold).nonzero().flatten(), (assigned == fold).nonzero().flatten()
        with user_code("fit", train.tolist(), f"fold {fold}"):
            found = _checked(fit(train), given, f"what fit returned for fold {fold}")
        if result is None:
            result = torch.empty_like(found)
        if found.shape != result.shape:
            raise DataError(
                f"fit returned {list(found.shape)} for fold {fold} and {list(result.shape)} before: give a column for "
                "every class."
            )
        result[held_out] = found[held_out]
    assert result is not None
    return result


def stratified_folds(labels: Tensor, *, folds: int = 5, seed: int = 0) -> Int[Tensor, " n"]:
    """The fold of each row: every class spread over the folds as evenly as can be, and the folds of equal size ± 1.

    Args:
        labels: The class of each row [n].
        folds: How many folds.
        seed: Which rows go together.

    Returns:
        Numbers from 0 to ``folds`` − 1 [n].

    Raises:
        OptionError: Fewer than 2 folds, or more than rows.
        DataError: A class with one row: the model that does not see the row does not know its class.
    """
    given = whole_numbers(labels)
    folds = whole_number(folds, "folds", 2, len(given), why=", the number of rows")
    classes, counts = given.unique(return_counts=True)
    if int(counts.min()) < 2:
        raise DataError(
            f"class {int(classes[counts.argmin()])} has one row: a model that does not see it does not know its class. Leave "
            "the class out, or add rows."
        )
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(len(given), generator=generator)
    by_class = mixed[given[mixed].argsort(stable=True)]
    assigned = torch.empty_like(given)
    assigned[by_class] = torch.arange(len(given)) % folds
    return assigned


def _checked(probabilities: Any, labels: Tensor, what: str) -> Float[Tensor, "n C"]:
    try:
        values = torch.as_tensor(probabilities).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} must be numbers [n, C]: {error}") from error
    classes = int(labels.max()) + 1
    if values.ndim != 2 or len(values) != len(labels) or values.shape[1] < max(classes, 2):
        raise DataError(
            f"{what} must be [n, C] for {len(labels)} rows and {classes} classes; the shape is {list(values.shape)}"
        )
    if int(labels.min()) < 0:
        raise DataError(
            f"row {int(labels.argmin())} has the label {int(labels.min())}: classes count from 0."
        )
    good = (values >= 0).all(1) & (values <= 1 + 1e-6).all(1) & ((values.sum(1) - 1).abs() <= 1e-3)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise DataError(f"{what}: row {row} is {values[row].tolist()}, no probabilities that add up to 1.")
    return values.clamp(max=1.0)


def _cleanlab() -> Any:
    try:
        return import_module("cleanlab.rank")
    except ImportError as cause:
        raise MissingExtraError("self_confidence needs cleanlab: pip install 'tracin[eval]'") from cause
