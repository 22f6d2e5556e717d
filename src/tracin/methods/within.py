"""Lists within a class: which train rows may stand in a query's lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.errors import OptionError
from tracin.scoring.evaluation import evaluate
from tracin.scoring.run import Settings
from tracin.scoring.top_k import Within, check_k
from tracin.tasks import Task

__all__ = ["allowed_rows", "check_within", "rows_within"]


def check_within(within: Any) -> None:
    """Refuse what is no choice of a class.

    Args:
        within: None: all rows; ``"label"``: rows of the query's label; a class number: rows of that class.

    Raises:
        OptionError: It is something else.
    """
    number = isinstance(within, int) and not isinstance(within, bool)
    if within is not None and within != "label" and not number:
        raise OptionError(f"within is {within!r}: give None, 'label' or a class number.")


def rows_within(asked: Tensor, labels: Tensor, k: int, within: str | int | None) -> Within | None:
    """The class of each query's lists.

    Args:
        asked: Labels of the queries [q].
        labels: Labels of the train rows [n].
        k: List length.
        within: As for ``check_within``.

    Returns:
        The classes, or None for all rows.

    Raises:
        OptionError: ``within`` is something else, k is out of range, or a class has fewer than k rows.
    """
    check_within(within)
    check_k(k, len(labels))
    if within is None:
        return None
    wanted = (asked if within == "label" else torch.full_like(asked, int(within))).cpu()
    labels = labels.cpu()
    for cls in wanted.unique().tolist():
        count = int((labels == cls).sum())
        if count < k:
            raise OptionError(
                f"k is {k}, but only {count} train rows have class {cls}: give a smaller k, or within=None."
            )
    return Within(wanted, labels)


def allowed_rows(
    task: Task,
    checkpoint: Checkpoint,
    settings: Settings,
    train: Any,
    queries: Any,
    k: int,
    within: str | int | None,
) -> Within | None:
    """The class of each query's lists, by the labels that the task's ``outputs`` bring.

    Args:
        task: Brings labels through ``outputs``.
        checkpoint: Where labels are read.
        settings: How rows are read.
        train: Train rows.
        queries: Query rows.
        k: List length.
        within: As for ``check_within``.

    Returns:
        The classes, or None for all rows.

    Raises:
        OptionError: There are no labels, a class has fewer than k rows, or ``within`` is something else.
    """
    check_within(within)
    if within is None:
        return None
    if task.outputs is None:
        raise OptionError(
            "within= needs labels: give Task(outputs=...), or use a ready-made classification loss."
        )
    options = {k: v for k, v in vars(settings).items() if k in ("batch_size", "collate", "device")}
    at = Trajectory([checkpoint])
    labels = evaluate(task, at, train, name="train", **options).labels
    asked = evaluate(task, at, queries, **options).labels
    assert labels is not None
    assert asked is not None
    return rows_within(asked, labels, k, within)
