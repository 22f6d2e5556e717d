"""Forward passes along a trajectory: losses and predictions, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.data import AUTO_ROWS, BatchSize, open_rows, to_device, user_code
from tracin.errors import LossError, OptionError
from tracin.scoring.guard import guarded
from tracin.shapes import Float, Int
from tracin.tasks import Task
from tracin.tasks.task import row_losses

__all__ = ["Evaluation", "checked_outputs", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Losses of every row at every checkpoint, and the predictions where the task has ``outputs``."""

    losses: Float[Tensor, "c n"]
    logits: Float[Tensor, "c n C"] | None
    labels: Int[Tensor, " n"] | None

    def predicted(self) -> Int[Tensor, " n"]:
        """The class predicted at the last checkpoint.

        Returns:
            Class numbers [n].

        Raises:
            OptionError: The task has no ``outputs``.
        """
        if self.logits is None:
            raise OptionError(
                "predictions need logits and labels: give Task(outputs=lambda model, batch: (logits [n, C], labels [n])), "
                "or use a ready-made classification loss."
            )
        return self.logits[-1].argmax(-1)


def evaluate(
    task: Task,
    trajectory: Trajectory,
    data: Any,
    *,
    name: str = "queries",
    batch_size: BatchSize = AUTO_ROWS,
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
) -> Evaluation:
    """Losses and predictions of all rows at every checkpoint.

    Args:
        task: Model and losses.
        trajectory: The checkpoints; their learning rates are not read.
        data: Rows, as the verbs of a method take them.
        name: ``"train"`` uses the training loss, ``"queries"`` the query loss.
        batch_size: Rows per batch.
        collate: For a dataset.
        device: Where to run.

    Returns:
        The evaluation, on the CPU.

    Raises:
        LossError: ``outputs`` returned other shapes than (logits [n, C], labels [n]).
    """
    rows = open_rows(data, name=name, batch_size=batch_size, collate=collate)
    loss = task.loss if name == "train" or task.query_loss is None else task.query_loss
    losses, logits, labels = [], [], []
    with guarded(task.model, device) as loaded:
        for checkpoint in trajectory:
            loaded.load(checkpoint)
            where = f"{name}, {checkpoint.name}"
            parts, found = [], []
            for batch in rows.batches():
                value = to_device(batch.value, loaded.device)
                parts.append(row_losses(loss, task.model, value, batch.rows, where).detach().cpu())
                if task.outputs is not None:
                    with user_code("outputs", batch.rows, where), torch.no_grad():
                        pair = task.outputs(task.model, to_device(batch.value, loaded.device))
                    found.append(checked_outputs(pair, batch.size))
            losses.append(torch.cat(parts))
            if found:
                logits.append(torch.cat([pair[0] for pair in found]))
                labels = [pair[1] for pair in found]
    return Evaluation(
        torch.stack(losses), torch.stack(logits) if logits else None, torch.cat(labels) if labels else None
    )


def checked_outputs(pair: Any, n: int) -> tuple[Tensor, Tensor]:
    """What ``outputs`` returned, held to its contract.

    Args:
        pair: What it returned.
        n: Rows of the batch.

    Returns:
        Logits [n, C] and labels [n], on the CPU.

    Raises:
        LossError: It is something else.
    """
    good = (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(item, Tensor) for item in pair)
        and pair[0].dim() == 2
        and pair[0].shape[0] == pair[1].shape[0] == n
        and pair[1].dim() == 1
    )
    if not good:
        told = (
            [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in pair]
            if isinstance(pair, tuple)
            else pair
        )
        raise LossError(
            f"outputs(model, batch) must return (logits [n, C], labels [n]) for {n} rows; it returned {told}."
        )
    return pair[0].detach().cpu(), pair[1].detach().cpu().long()
