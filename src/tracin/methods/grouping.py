"""Groups of validation rows: which row belongs to which, as the user says it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.errors import OptionError
from tracin.scoring.evaluation import evaluate
from tracin.scoring.run import Settings
from tracin.tasks import Task

__all__ = ["group_labels"]


def group_labels(
    task: Task, checkpoint: Checkpoint, settings: Settings, validation: Any, by: Any
) -> Tensor | None:
    """The group of each validation row.

    Args:
        task: Brings labels through ``outputs``.
        checkpoint: Where labels are read.
        settings: How rows are read.
        validation: The rows; read only for their labels.
        by: Whole numbers, one for each row; ``"label"``: the task's labels; None: all rows are one group.

    Returns:
        The groups [m], or None for one.

    Raises:
        OptionError: ``by`` is something else, or there are no labels.
    """
    if by is None:
        return None
    if not isinstance(by, str):
        return _given(by)
    if by != "label":
        raise OptionError(f"aggregate: by is {by!r}. Give None, 'label', or the group of each row.")
    if task.outputs is None:
        raise OptionError(
            "aggregate: by='label' needs labels: give Task(outputs=...), use a ready-made classification loss, or give by= the "
            "group of each row."
        )
    options = {
        name: value for name, value in vars(settings).items() if name in ("batch_size", "collate", "device")
    }
    labels = evaluate(task, Trajectory([checkpoint]), validation, **options).labels
    assert labels is not None
    return labels


def _given(by: Any) -> Tensor:
    try:
        groups = by if isinstance(by, Tensor) else torch.as_tensor(list(by))
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        raise OptionError(
            f"aggregate: by is a {type(by).__name__} that holds no whole numbers. Give the group of each row."
        ) from cause
    whole = not (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool)
    if groups.dim() == 1 and (whole or not len(groups)):
        found = groups.detach().to("cpu", torch.int64)
        if groups.dtype == torch.uint64 and bool((found < 0).any()):
            raise OptionError("aggregate: by has groups beyond 2**63 - 1. Number the groups anew.")
        return found
    held = str(groups.dtype).removeprefix("torch.")
    raise OptionError(
        f"aggregate: by is {held} {list(groups.shape)}. Give the group of each row: whole numbers [m]."
    )
