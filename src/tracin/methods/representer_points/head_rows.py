"""The train rows as the last layer sees them, and that layer fitted anew as a sum over them.

Axis letters: n rows · d features · C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracin.checksums import Passes, refuse_unsteady
from tracin.data import Batch, RowSource, to_device
from tracin.methods.representer_points.head_loss import HeadLoss, check_loss, find_place, kept_for_loss
from tracin.methods.representer_points.refit import HeadFit, fit_head
from tracin.progress import progress
from tracin.scoring.head import HeadRows, refuse_too_large, see_head
from tracin.shapes import Float, Int
from tracin.tasks import Task, losses

__all__ = ["HeadReader", "Refit", "refit_head", "with_constant"]


@dataclass(frozen=True, eq=False)
class Refit:
    r"""The last layer fitted anew, written as a sum over the train rows: :math:`\Theta = \sum_i \alpha_i f_i^\top`.

    Args:
        weight: :math:`\Theta` [C, d]; its last column is the bias, where the head has one.
        alpha: :math:`\alpha_i = -\frac{1}{2 \lambda n} \, \partial \ell_i / \partial u_i` [n, C].
        features: The train rows' features [n, d].
        labels: Their labels [n].
        gradient_norm: The norm of the objective's gradient that was reached.
        residual: That norm over 2λ‖Θ‖: the relative error of the sum.
        steps: Newton steps taken.
        agreement: The share of train rows for which the refitted head predicts the class that the model's own does.
        correlation: Pearson's correlation of both heads' logits over all train rows and classes.
    """

    weight: Float[Tensor, "C d"]
    alpha: Float[Tensor, "n C"]
    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    gradient_norm: float
    residual: float
    steps: int
    agreement: float
    correlation: float


def with_constant(features: Tensor, layer: nn.Linear) -> Tensor:
    """The features in float64, with a constant 1 for the bias, where the layer has one."""
    wide = features.double()
    return wide if layer.bias is None else torch.cat([wide, torch.ones_like(wide[:, :1])], 1)


@dataclass(frozen=True, eq=False)
class HeadReader:
    """Reads rows through the model for its head.

    Args:
        task: Model, which holds the checkpoint, loss and ``outputs``.
        name: The head's name.
        layer: The head.
        rows: The data.
        device: Where the model lies.
        where: Checkpoint and data source, for messages.
        memory: Bytes to hold.
        show: Show progress.
        passes: What the first pass gave.
    """

    task: Task
    name: str
    layer: nn.Linear
    rows: RowSource
    device: torch.device
    where: str
    memory: int
    show: bool
    passes: Passes = field(default_factory=Passes)

    def batches(self) -> Iterator[tuple[Batch, HeadRows]]:
        """One pass over the data; rows that come back different are refused.

        Yields:
            Each batch, and its rows as the head sees them.
        """
        held = 0
        with progress(f"features, {self.rows.name}", len(self.rows), show=self.show) as bar:
            for batch in self.rows.batches():
                if batch.start == 0:
                    refuse_unsteady(self.rows, batch)
                self.passes.check(self.rows, batch)
                rows = see_head(self.task, self.layer, self.name, batch, self.value(batch), self.where)
                # Features twice in float64 (they are joined), and what the fit keeps for every logit.
                held += 8 * (2 * rows.features.numel() + 6 * rows.logits.numel())
                refuse_too_large(held, batch, self.rows, self.memory)
                yield batch, rows
                bar.advance(batch.size)

    def value(self, batch: Batch) -> Any:
        """A copy of the batch on the device, which the model may write into."""
        return to_device(batch.value, self.device, copy=True)


@dataclass(eq=False)
class _Kept:
    """What the loss needs of the train rows: kept, or read anew at each pass where that takes too much memory."""

    reader: HeadReader
    parts: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, batch: Batch, value: Any) -> None:
        self.nbytes += sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        self.parts.append((batch.rows, value))
        if not self.whole:
            self.parts.clear()

    @property
    def whole(self) -> bool:
        """Whether every batch is kept."""
        return self.nbytes <= self.reader.memory // 2

    def join(self) -> None:
        """Give the ready-made loss all rows at once."""
        if self.parts and self.reader.task.loss is losses.cross_entropy:
            n = sum(len(rows) for rows, _ in self.parts)
            self.parts = [(range(n), (None, torch.cat([value[1] for _, value in self.parts])))]

    def __call__(self) -> Iterator[tuple[Sequence[int], Any]]:
        if self.whole:
            yield from self.parts
            return
        for batch in self.reader.rows.batches():
            self.reader.passes.check(self.reader.rows, batch)
            yield batch.rows, kept_for_loss(self.reader.task.loss, self.reader.value(batch))


def refit_head(reader: HeadReader, *, l2: float, tolerance: float) -> Refit:
    """Fit the head anew on the rows.

    Args:
        reader: Of the train rows.
        l2: λ.
        tolerance: Of the fit.

    Returns:
        The refit, on the device, in float64.
    """
    seen: list[HeadRows] = []
    kept = _Kept(reader)
    loss: HeadLoss | None = None
    for batch, rows in reader.batches():
        value = kept_for_loss(reader.task.loss, reader.value(batch))
        if loss is None:
            place = find_place(
                reader.task, reader.layer, reader.name, batch, reader.value(batch), reader.where
            )
            loss = HeadLoss(reader.task.loss, place, kept, reader.where)
            noise = torch.randn(rows.logits.shape, generator=torch.Generator().manual_seed(0))
            elsewhere = rows.logits + noise.to(rows.logits)
            check_loss(reader.task, reader.layer, loss, batch, (reader.value(batch), value), elsewhere)
        check_loss(reader.task, reader.layer, loss, batch, (reader.value(batch), value), rows.logits)
        seen.append(rows)
        kept.add(batch, value)
    assert loss is not None
    kept.join()
    layer = reader.layer
    start = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1)
    features = with_constant(torch.cat([rows.features for rows in seen]), layer)
    fit = fit_head(features, start.detach().double(), loss, loss.curvature, l2=l2, tolerance=tolerance)
    labels, logits = torch.cat([rows.labels for rows in seen]), torch.cat([rows.logits for rows in seen])
    return _written(fit, features, labels, logits.double(), l2)


def _written(fit: HeadFit, features: Tensor, labels: Tensor, logits: Tensor, l2: float) -> Refit:
    """The fit as a sum over the rows, and how far it agrees with the model's own logits."""
    fitted = features @ fit.weight.mT
    pair = torch.stack([fitted.reshape(-1), logits.reshape(-1)])
    pair = pair - pair.mean(1, keepdim=True)
    norms = pair.norm(dim=1).prod()
    return Refit(
        weight=fit.weight,
        alpha=-fit.slopes / (2 * l2 * len(features)),
        features=features,
        labels=labels,
        gradient_norm=fit.gradient_norm,
        residual=fit.residual,
        steps=fit.steps,
        agreement=float((fitted.argmax(1) == logits.argmax(1)).double().mean()),
        correlation=float(pair.prod(0).sum() / norms) if norms > 0 else 0.0,
    )
