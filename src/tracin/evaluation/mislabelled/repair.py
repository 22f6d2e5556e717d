"""Repairs: the labels of the first rows of an order are corrected, and the model is trained again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tracin.evaluation.flips import Flips
from tracin.evaluation.mislabelled.design import Design, digest_of
from tracin.evaluation.mislabelled.result import RANDOM_ORDER, Cell, Repaired
from tracin.evaluation.mislabelled.training import Trainer

__all__ = ["repair", "repaired_labels"]


def repair(
    cell: Cell,
    scores: Mapping[str, Tensor],
    flips: Flips,
    true_labels: Tensor,
    trainer: Trainer,
    design: Design,
) -> Iterator[str]:
    """Correct and train again, for every method that ran, a random order, and all labels true.

    Orders whose corrected labels are the same are trained on once. Each training has the weights and the order of rows
    of the cell's own.

    Args:
        cell: Gets the results.
        scores: Suspicion [n] by method.
        flips: The flipped labels.
        true_labels: Before.
        trainer: Trains.
        design: The shares of rows inspected.

    Yields:
        A line about each training, after its result is in the cell.
    """
    if cell.clean_accuracy is None:
        cell.clean_accuracy = _accuracy(cell, true_labels, trainer)
        yield f"all labels true: {100 * cell.clean_accuracy:.1f} % of the test rows right"
    there = {(each.order, each.share) for each in cell.repaired}
    shuffled = torch.rand(len(true_labels), generator=torch.Generator().manual_seed(cell.seed))
    orders = {RANDOM_ORDER: shuffled, **{name: scores[name] for name in design.methods if name in scores}}
    for order, values in orders.items():
        for share in sorted(design.repair):
            if (order, share) in there:
                continue
            labels = repaired_labels(values, flips.labels, true_labels, share)
            corrected = int((labels != flips.labels).sum())
            accuracy = _accuracy(cell, labels, trainer)
            cell.repaired.append(Repaired(order, share, corrected, accuracy))
            yield (
                f"{order}, {100 * share:.3g} % inspected: {corrected:,} labels corrected, {100 * accuracy:.1f} % of the test "
                "rows right"
            )


def repaired_labels(scores: Tensor, labels: Tensor, true_labels: Tensor, share: float) -> Tensor:
    """The labels after the first ``⌊share · n⌋`` rows by descending score were looked at.

    Args:
        scores: Suspicion [n].
        labels: Given labels [n], some wrong.
        true_labels: The right ones [n].
        share: Of the rows.

    Returns:
        Labels [n].
    """
    rows = torch.argsort(scores, descending=True, stable=True)[: int(share * len(labels) + 1e-9)]
    repaired = labels.clone()
    repaired[rows] = true_labels[rows]
    return repaired


def _accuracy(cell: Cell, labels: Tensor, trainer: Trainer) -> float:
    digest = digest_of(labels.contiguous().numpy().tobytes())
    if digest not in cell.retrained:
        rows = (trainer.data.train[0], labels)
        trajectory = trainer.last(rows, cell.seed, schedule=cell.schedule)
        cell.retrained[digest] = trainer.accuracy(trajectory)
    return cell.retrained[digest]
