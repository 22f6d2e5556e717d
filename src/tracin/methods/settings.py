"""Options that every method takes, checked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tracin.errors import OptionError
from tracin.scoring.run import WEIGHTINGS, Settings, parse_memory
from tracin.tasks import Task

__all__ = ["checked_settings", "require_task"]


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


def checked_settings(
    owner: str,
    *,
    weighting: str = "uniform",
    normalize: bool = False,
    batch_size: int = 256,
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
    memory: str | int = "2GiB",
    progress: bool = True,
) -> Settings:
    """The settings of a run.

    Args:
        owner: The method, for messages.
        weighting: Which rate each checkpoint gets.
        normalize: Cosines instead of products.
        batch_size: Rows per batch.
        collate: Makes a batch of a list of rows.
        device: Where to run.
        memory: Bound on held gradients and tiles.
        progress: Show how far a run is.

    Returns:
        The settings.

    Raises:
        OptionError: One of them is out of range or of another type.
    """
    if weighting not in WEIGHTINGS:
        raise OptionError(f"{owner}: weighting is {weighting!r}. Choose one of {', '.join(WEIGHTINGS)}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"batch_size is {batch_size!r}: give a whole number of rows, at least 1.")
    for name, value in (("normalize", normalize), ("progress", progress)):
        if not isinstance(value, bool):
            raise OptionError(f"{owner}: {name} is {value!r}. Give True or False.")
    if collate is not None and not callable(collate):
        raise OptionError(
            f"{owner}: collate is a {type(collate).__name__}, not a function of a list of rows."
        )
    return Settings(weighting, normalize, batch_size, collate, device, parse_memory(memory), progress)
