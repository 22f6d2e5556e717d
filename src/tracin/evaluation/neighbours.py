"""Do the rows that look alike have the same label? The vote of the nearest neighbours, as the model sees the rows.

Axis letters: n rows · d features · k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Checkpoint
from tracin.data import BatchSize
from tracin.errors import DataError, NotFiniteError
from tracin.options import whole_number
from tracin.scoring.head import layer_rows, refuse_no_classes
from tracin.shapes import Float
from tracin.tasks import Task

__all__ = ["neighbour_disagreement", "neighbour_suspicion"]

# Cosines that differ by less are equal up to rounding.
_TIE = 1e-12
_TILE_BYTES = 64 << 20


def neighbour_disagreement(features: Tensor, labels: Tensor, *, k: int = 10) -> Float[Tensor, " n"]:
    """The share of a row's k nearest neighbours that have another label, by the cosine of their features.

    The row itself does not count. Where several rows are equally near and not all of them are among the k, they share
    the places that are left, so that the order of the rows does not matter. A row whose features are all zero
    has the cosine 0 with every other.

    Args:
        features: One vector per row [n, d].
        labels: The class of each row [n].
        k: Neighbours.

    Returns:
        Suspicions [n] from 0 to 1, float64 on the CPU.

    Raises:
        OptionError: k is not a whole number from 1 to n − 1.
        DataError: Shapes that do not agree.
        NotFiniteError: A feature that is NaN or infinite; the row is named.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> neighbour_disagreement(features, torch.tensor([0, 0, 1, 1, 1]), k=2)
        tensor([0.5000, 0.5000, 1.0000, 0.0000, 0.0000], dtype=torch.float64)
    """
    features, labels = features.detach().double(), labels.detach().to(features.device)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise DataError(
            f"features must be [n, d] and labels [n]; the shapes are {list(features.shape)} and {list(labels.shape)}: give "
            "one vector and one class per row."
        )
    n = len(features)
    k = whole_number(k, "k", 1, n - 1, why=f", neighbours among {n} rows")
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        raise NotFiniteError(
            f"the features of row {int((~finite).nonzero()[0])} are not finite: look at this row's input, or leave it out."
        )
    # Scaled by the largest entry first, so that neither tiny nor huge features leave the range of float64.
    features = features / features.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    unit = features / features.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    found = []
    for rows in torch.arange(n, device=unit.device).split(max(1, _TILE_BYTES // (8 * n))):
        cosines = unit[rows] @ unit.mT
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        last = cosines.topk(k, dim=1).values[:, -1:]
        nearer, tied = cosines > last + _TIE, (cosines - last).abs() <= _TIE
        other = labels[rows][:, None] != labels[None]
        places = (k - nearer.sum(1)).double() / tied.sum(1)
        found.append(((nearer & other).sum(1) + places * (tied & other).sum(1)) / k)
    return torch.cat(found).double().cpu()


def neighbour_suspicion(
    task: Task,
    checkpoint: Checkpoint,
    data: Any,
    *,
    k: int = 10,
    layer: str | None = None,
    batch_size: BatchSize = "auto",
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
    memory: str | int = "2GiB",
) -> Float[Tensor, " n"]:
    """``neighbour_disagreement`` among the train rows, in the features that the last layer sees.

    Args:
        task: Model, loss and ``outputs``.
        checkpoint: The weights.
        data: Rows, as the verbs of a method take them.
        k: Neighbours.
        layer: The module whose input the features are; None: the last ``Linear``.
        batch_size: Rows per batch.
        collate: Makes a batch of a list of a dataset's rows.
        device: Where to run.
        memory: Bound on the features, as they are read.

    Returns:
        Suspicions [n].

    Raises:
        OptionError: The task has no ``outputs``, there is no such layer, k is not from 1 to n − 1, or the features exceed
            ``memory``.
        DataError: A row comes back different when it is read again.
        LossError: The layer is not called once per batch, on a tensor with one entry per row.
        NotFiniteError: A feature that is NaN or infinite; the row is named.
        UserCodeError: The model or the dataset fails.
    """
    refuse_no_classes(task, "neighbour_suspicion")
    found = layer_rows(
        task,
        checkpoint,
        data,
        layer=layer,
        batch_size=batch_size,
        collate=collate,
        device=device,
        memory=memory,
    )
    assert found.labels is not None
    return neighbour_disagreement(found.features, found.labels, k=k)
