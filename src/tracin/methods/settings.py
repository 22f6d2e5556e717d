"""Options that every method takes, checked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tracin.data import BatchSize, require_batch_size
from tracin.errors import OptionError
from tracin.gradients.precision import PRECISIONS
from tracin.gradients.projection import Projection
from tracin.scoring.fits import VERBS
from tracin.scoring.memory import parse_memory
from tracin.scoring.run import WEIGHTINGS, Settings
from tracin.tasks import Task

__all__ = ["check_verb", "checked_settings", "require_task"]


def require_task(task: Any, owner: str) -> Task:
    """The task, or an error that says what to give.

    Args:
        task: What the user gave.
        owner: The method, for the message.

    Returns:
        The task.

    Raises:
        OptionError: It is something else.
    """
    if not isinstance(task, Task):
        raise OptionError(f"{owner}: task is a {type(task).__name__}. Give tracin.Task(model, loss).")
    return task


def check_verb(verb: Any, queries: Any) -> str:
    """What a plan is made for.

    Args:
        verb: What the user gave; None: by whether there are queries.
        queries: The queries, or None.

    Returns:
        The verb.

    Raises:
        OptionError: There is no such verb, or it needs queries and there are none.
    """
    if verb is None:
        return "self_influence" if queries is None else "influence"
    if verb not in VERBS:
        raise OptionError(f"plan: verb is {verb!r}. Choose one of {', '.join(VERBS)}.")
    if queries is None and verb != "self_influence":
        raise OptionError(f"plan: {verb} needs queries. Give plan(train, queries, verb={verb!r}).")
    return verb


def checked_settings(
    owner: str,
    *,
    weighting: str = "uniform",
    normalize: bool = False,
    batch_size: BatchSize = "auto",
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
    memory: str | int = "2GiB",
    progress: bool = True,
    projection: Projection | int | None = None,
    precision: str = "float32",
) -> Settings:
    """The settings of a run.

    Args:
        owner: The method, for messages.
        weighting: Which rate each checkpoint gets.
        normalize: Cosines instead of products.
        batch_size: Rows per batch, or ``"auto"``.
        collate: Makes a batch of a list of rows.
        device: Where to run.
        memory: Bound on held gradients and tiles.
        progress: Show how far a run is.
        projection: Random features in place of gradients; a number is their size.
        precision: The arithmetic of the forward and backward pass.

    Returns:
        The settings.

    Raises:
        OptionError: One of them is out of range or of another type.
    """
    if weighting not in WEIGHTINGS:
        raise OptionError(f"{owner}: weighting is {weighting!r}. Choose one of {', '.join(WEIGHTINGS)}.")
    require_batch_size(batch_size)
    for name, value in (("normalize", normalize), ("progress", progress)):
        if not isinstance(value, bool):
            raise OptionError(f"{owner}: {name} is {value!r}. Give True or False.")
    if collate is not None and not callable(collate):
        raise OptionError(
            f"{owner}: collate is a {type(collate).__name__}, not a function of a list of rows."
        )
    if precision not in PRECISIONS:
        raise OptionError(f"{owner}: precision is {precision!r}. Choose one of {', '.join(PRECISIONS)}.")
    return Settings(
        weighting,
        normalize,
        batch_size,
        collate,
        device,
        parse_memory(memory),
        progress,
        _checked_projection(owner, projection),
        precision=precision,
    )


def _checked_projection(owner: str, projection: Any) -> Projection | None:
    if projection is None or isinstance(projection, Projection):
        return projection
    if isinstance(projection, int) and not isinstance(projection, bool):
        return Projection(projection)
    raise OptionError(
        f"{owner}: projection is {projection!r}. Give a number of features, tracin.Projection(size=...), or None."
    )
