"""Lists within a class: which train rows may stand in a query's lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.errors import OptionError
from tracin.scoring.evaluation import evaluate
from tracin.scoring.run import Settings
from tracin.shapes import Bool
from tracin.tasks import Task

__all__ = ["allowed_rows"]


def allowed_rows(
    task: Task,
    checkpoint: Checkpoint,
    settings: Settings,
    train: Any,
    queries: Any,
    k: int,
    within: str | int | None,
) -> Bool[Tensor, "q n"] | None:
    """The train rows of each query's class.

    Args:
        task: Brings labels through ``outputs``.
        checkpoint: Where labels are read.
        settings: How rows are read.
        train: Train rows.
        queries: Query rows.
        k: List length.
        within: None: all rows; ``"label"``: rows of the query's label; a class number: rows of that class.

    Returns:
        Bool [q, n], or None for all rows.

    Raises:
        OptionError: There are no labels, a class has fewer than k rows, or ``within`` is something else.
    """
    if within is None:
        return None
    if within != "label" and (isinstance(within, bool) or not isinstance(within, int)):
        raise OptionError(f"within is {within!r}: give None, 'label' or a class number.")
    options = {k: v for k, v in vars(settings).items() if k in ("batch_size", "collate", "device")}
    at = Trajectory([checkpoint])
    labels = evaluate(task, at, train, name="train", **options).labels
    asked = evaluate(task, at, queries, **options).labels
    if labels is None or asked is None:
        raise OptionError(
            "within= needs labels: give Task(outputs=...), or use a ready-made classification loss."
        )
    wanted = asked if within == "label" else torch.full_like(asked, int(within))
    for cls in wanted.unique().tolist():
        count = int((labels == cls).sum())
        if count < k:
            raise OptionError(f"k is {k}, but only {count} train rows have class {cls}.")
    return wanted[:, None] == labels[None, :]
