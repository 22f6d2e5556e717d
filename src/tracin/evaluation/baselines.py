"""Simple suspicion scores, most of them from forward passes alone: what any method that finds wrong labels has to beat.

Each gives one number per row [n], float64 on the CPU: the higher, the more suspect. All but the gradient norm read an
``Evaluation``, which one call of ``evaluate(task, trajectory, train, name="train")`` makes for all of them, or the
tensors in it.

Axis letters: n rows · c checkpoints · C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.data import BatchSize
from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.methods import TracInCP
from tracin.scoring.evaluation import Evaluation
from tracin.shapes import Float, Int
from tracin.tasks import Task

__all__ = ["area_under_margin", "forgetting", "gradient_norm", "last_loss", "margin", "mean_loss"]


def mean_loss(found: Evaluation | Tensor) -> Float[Tensor, " n"]:
    r"""The mean loss over the checkpoints, :math:`\frac1c \sum_c \ell_i(\theta_c)`.

    Args:
        found: An evaluation, or losses [c, n].

    Returns:
        Suspicions [n].

    Raises:
        DataError: Losses of another shape.
        NotFiniteError: A loss that is NaN or infinite; the row and checkpoint are named.

    Example:
        >>> mean_loss(torch.tensor([[2.0, 1.0], [1.0, 0.0]]))
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    return _losses(found).mean(0)


def last_loss(found: Evaluation | Tensor) -> Float[Tensor, " n"]:
    """The loss at the last checkpoint.

    Args:
        found: An evaluation, or losses [c, n].

    Returns:
        Suspicions [n].

    Raises:
        DataError: Losses of another shape.
        NotFiniteError: A loss that is NaN or infinite; the row and checkpoint are named.
    """
    return _losses(found)[-1]


def margin(found: Evaluation | Tensor, labels: Tensor | None = None) -> Float[Tensor, " n"]:
    r"""The margin at the last checkpoint, turned around: :math:`\max_{k \ne y_i} u_{ik} - u_{i y_i}`.

    Args:
        found: An evaluation with logits, or logits [c, n, C].
        labels: With logits: the class of each row [n].

    Returns:
        Suspicions [n], in logits; above 0 where another class is predicted.

    Raises:
        OptionError: There are no logits or no labels.
        DataError: Shapes that do not agree, or a label without a logit.
        NotFiniteError: A logit that is NaN or infinite; the row and checkpoint are named.

    Example:
        >>> margin(torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]), torch.tensor([0, 1]))
        tensor([-2.,  2.], dtype=torch.float64)
    """
    logits, given = _logits(found, labels)
    return _margins(logits[-1:], given)[0]


def area_under_margin(found: Evaluation | Tensor, labels: Tensor | None = None) -> Float[Tensor, " n"]:
    r"""The mean margin over the checkpoints, turned around (AUM; Pleiss, Zhang, Elenberg and Weinberger 2020, section 3).

    .. math::
        -\mathrm{AUM}_i = \frac1c \sum_c \left( \max_{k \ne y_i} u^{(c)}_{ik} - u^{(c)}_{i y_i} \right)

    A wrong label must be learnt against what the other rows of the true class teach, so its margin is small or negative for
    much of the run. The paper averages over all epochs up to the first drop of the learning rate; here it is the checkpoints
    that are given, and ``trajectory[:k]`` gives fewer.

    Args:
        found: An evaluation with logits, or logits [c, n, C].
        labels: With logits: the class of each row [n].

    Returns:
        Suspicions [n], in logits.

    Raises:
        OptionError: There are no logits or no labels.
        DataError: Shapes that do not agree, or a label without a logit.
        NotFiniteError: A logit that is NaN or infinite; the row and checkpoint are named.
    """
    logits, given = _logits(found, labels)
    return _margins(logits, given).mean(0)


def forgetting(found: Evaluation | Tensor, labels: Tensor | None = None) -> Float[Tensor, " n"]:
    """How often a row is forgotten: right at one checkpoint and wrong at the next (Toneva et al. 2019, section 3).

    A row that is right at no checkpoint was never learnt and cannot be forgotten; the paper counts it as forgotten without
    end. Here it gets c, the number of checkpoints: more than any row can be forgotten, ⌊c/2⌋, so that such rows come
    first. The paper looks at a row whenever it stands in a batch; here it is looked at once per checkpoint, so counts are
    smaller. Many rows tie; rankings put the lower row first.

    Args:
        found: An evaluation with logits, or logits [c, n, C].
        labels: With logits: the class of each row [n].

    Returns:
        Suspicions [n], whole numbers.

    Raises:
        OptionError: There are no logits or no labels.
        DataError: Shapes that do not agree, or a label without a logit.
        NotFiniteError: A logit that is NaN or infinite; the row and checkpoint are named.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0]] * 3, [[1.0, 2.0]] * 3, [[2.0, 1.0]] * 3])
        >>> logits[:, 2] = torch.tensor([2.0, 1.0])
        >>> forgetting(logits, torch.tensor([0, 1, 1]))
        tensor([1., 1., 3.], dtype=torch.float64)
    """
    logits, given = _logits(found, labels)
    right = logits.argmax(2) == given
    forgotten = (right[:-1] & ~right[1:]).sum(0)
    return forgotten.where(right.any(0), len(right)).double()


def gradient_norm(
    task: Task,
    checkpoint: Checkpoint,
    data: Any,
    *,
    batch_size: BatchSize = "auto",
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
    memory: str | int = "2GiB",
    progress: bool = True,
) -> Float[Tensor, " n"]:
    r"""The norm of each row's gradient at one checkpoint, :math:`\lVert \nabla_\theta \ell(\theta, z_i) \rVert`.

    It is the root of TracIn's self-influence at this checkpoint with weight 1, and ranks alike.

    Args:
        task: Model and loss; its ``parameters`` say over which the norm is taken.
        checkpoint: The weights.
        data: Rows, as the verbs of a method take them.
        batch_size: Rows per batch.
        collate: Makes a batch of a list of a dataset's rows.
        device: Where to run.
        memory: Bound on held gradients.
        progress: Show how far the run is.

    Returns:
        Suspicions [n].

    Raises:
        OptionError: An option out of range; and what ``TracInCP.self_influence`` refuses of the rows, the loss, the model and
            the checkpoint.
    """
    method = TracInCP(
        task,
        Trajectory([checkpoint]),
        weighting="uniform",
        batch_size=batch_size,
        collate=collate,
        device=device,
        memory=memory,
        progress=progress,
    )
    return method.self_influence(data).values.double().sqrt()


def _losses(found: Evaluation | Tensor) -> Float[Tensor, "c n"]:
    losses = (found.losses if isinstance(found, Evaluation) else found).detach().cpu().double()
    if losses.ndim != 2 or losses.numel() == 0:
        raise DataError(
            f"losses must be [c, n], one row per checkpoint; the shape is {list(losses.shape)}: give those of "
            "evaluate(task, trajectory, train, name='train'), or losses[None] for one checkpoint."
        )
    _refuse_not_finite("loss", losses[:, :, None])
    return losses


def _logits(
    found: Evaluation | Tensor, labels: Tensor | None
) -> tuple[Float[Tensor, "c n C"], Int[Tensor, " n"]]:
    if isinstance(found, Evaluation):
        if found.logits is None or found.labels is None:
            raise OptionError(
                "margins and forgetting need logits and labels: give Task(outputs=lambda model, batch: (logits [n, C], labels "
                "[n])), or use a ready-made classification loss."
            )
        logits, labels = found.logits, found.labels
    else:
        logits = found
    if labels is None:
        raise OptionError("logits alone do not say which class is the label: give labels [n] too.")
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu()
    if logits.ndim != 3 or logits.shape[2] < 2 or labels.shape != logits.shape[1:2] or logits.numel() == 0:
        raise DataError(
            f"logits must be [c, n, C] with 2 classes or more, and labels [n]; the shapes are {list(logits.shape)} and "
            f"{list(labels.shape)}: give those of one evaluation, or logits[None] for one checkpoint."
        )
    outside = (labels < 0) | (labels >= logits.shape[2])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise DataError(
            f"row {row} has the label {int(labels[row])}, and there are {logits.shape[2]} logits: classes count from 0, and "
            "every one needs a logit."
        )
    _refuse_not_finite("logits", logits)
    return logits, labels.long()


def _margins(logits: Float[Tensor, "c n C"], labels: Int[Tensor, " n"]) -> Float[Tensor, "c n"]:
    own = labels[None, :, None].expand(len(logits), -1, 1)
    others = logits.scatter(2, own, -torch.inf).amax(2)
    return others - logits.gather(2, own)[:, :, 0]


def _refuse_not_finite(what: str, values: Float[Tensor, "c n k"]) -> None:
    finite = values.isfinite().all(2)
    if not bool(finite.all()):
        at, row = (int(place) for place in (~finite).nonzero()[0])
        raise NotFiniteError(
            f"the {what} of row {row} at checkpoint {at} is not finite: leave the checkpoint out."
        )
