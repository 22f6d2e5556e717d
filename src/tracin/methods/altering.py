"""A method that differs from another in its task or in some settings, and in nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from tracin.methods.tracin_cp import TracInCP
from tracin.tasks import Task

__all__ = ["altered", "with_training_loss"]


def altered(method: TracInCP, *, task: Task | None = None, **settings: Any) -> TracInCP:
    """A method that differs in its task or in some settings; it warns of its trajectory no second time.

    Args:
        method: A method.
        task: Another task.
        settings: What is different.

    Returns:
        A new method.
    """
    other = copy.copy(method)
    other.task = task or method.task
    other.settings = replace(method.settings, **settings)
    return other


def with_training_loss(method: TracInCP) -> TracInCP:
    """The method that asks about training rows, whose loss is the training loss.

    Args:
        method: A method.

    Returns:
        It, without a query loss of its own.
    """
    if method.task.query_loss is None:
        return method
    return altered(method, task=replace(method.task, query_loss=None))
