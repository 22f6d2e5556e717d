"""The signals of an audit: one pass of forward passes along the trajectory, reduced to one number per row as it goes.

Axis letters: n rows · c checkpoints · C classes · t rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.audit.neighbours import Neighbourhood
from tracin.data import RowSource, open_rows, to_device
from tracin.errors import DataError, OptionError
from tracin.evaluation import last_loss, margin
from tracin.explain import evaluate_rows
from tracin.methods import TracInCP
from tracin.progress import Progress, progress
from tracin.scoring.evaluation import Evaluation, evaluate
from tracin.scoring.guard import guarded
from tracin.scoring.head import last_linear, layer_rows
from tracin.shapes import Float, Int
from tracin.tasks import losses
from tracin.tasks.losses import predict, split_batch

__all__ = ["Seen", "chosen_checkpoints", "features_of", "see", "targets_of"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What forward passes tell of every row.

    Args:
        loss: The loss at the last checkpoint [n].
        mean_loss: The mean over the checkpoints [n].
        labels: The given classes [n]; this and what follows is None for a task without classes.
        classes: The number of classes.
        margin: Logit of the given class − the largest other logit, at the last checkpoint [n].
        aum: The mean of the margins over the checkpoints [n].
        neighbour_agreement: The share of the nearest neighbours with the given class [n].
        doubt: How far another class is preferred to the given one, by the probabilities averaged over the checkpoints and by
            the neighbours' votes [n], from −1 to 1.
        predicted: The class preferred by both together [n].
        suggested: The class other than the given one that is preferred by both together [n].
    """

    loss: Float[Tensor, " n"]
    mean_loss: Float[Tensor, " n"]
    labels: Int[Tensor, " n"] | None = None
    classes: int | None = None
    margin: Float[Tensor, " n"] | None = None
    aum: Float[Tensor, " n"] | None = None
    neighbour_agreement: Float[Tensor, " n"] | None = None
    doubt: Float[Tensor, " n"] | None = None
    predicted: Int[Tensor, " n"] | None = None
    suggested: Int[Tensor, " n"] | None = None


def see(method: TracInCP, train: Any, neighbours: bool) -> Seen:
    """Losses, margins, predictions and neighbours' votes.

    The logits of a tile of rows at one checkpoint are held at a time, with the tile's mean probabilities; how many rows
    make a tile follows from ``memory=`` of the method.

    Args:
        method: Task, checkpoints and settings.
        train: The rows.
        neighbours: Whether to ask the neighbours; the task then has classes and a ``Linear``.

    Returns:
        The signals.

    Raises:
        OptionError: The task has one class.
    """
    settings = method.settings
    source = open_rows(train, name="train", batch_size=settings.batch_size, collate=settings.collate)
    first = evaluate_rows(method, source, [0], name="train", trajectory=method.trajectory[-1:])
    classes = None if first.logits is None else first.logits.shape[2]
    if classes is not None and classes < 2:
        raise OptionError(f"the audit needs 2 classes or more, and outputs gives {classes} logit per row.")
    tiles = _tiles(len(source), classes, settings.memory)
    c = len(method.trajectory)
    votes = None
    with progress("losses and margins", c * len(source), show=settings.progress) as bar:
        if neighbours and classes is not None:
            votes = Neighbourhood.of(*features_of(method, train), classes)
        parts = [_tile(method, train, source, rows, len(tiles) == 1, bar, votes) for rows in tiles]
    fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0]) if name != "classes"}
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in fields.items()}
    return Seen(**joined, classes=classes)  # type: ignore[arg-type]


def _tiles(n: int, classes: int | None, memory: int) -> list[range]:
    """Logits, their copy in float64, probabilities and their sums are held: about 40 bytes per row and class."""
    size = n if classes is None else max(1, memory // (40 * classes))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _evaluations(
    method: TracInCP, train: Any, source: RowSource, rows: range, whole: bool, bar: Progress
) -> Iterator[Evaluation]:
    settings = method.settings
    for at in range(len(method.trajectory)):
        one = method.trajectory[at : at + 1]
        if whole:
            yield evaluate(
                method.task,
                one,
                train,
                name="train",
                batch_size=settings.batch_size,
                collate=settings.collate,
                device=settings.device,
            )
        else:
            yield evaluate_rows(method, source, rows, name="train", trajectory=one)
        bar.advance(len(rows))


def _tile(
    method: TracInCP,
    train: Any,
    source: RowSource,
    rows: range,
    whole: bool,
    bar: Progress,
    votes: Neighbourhood | None,
) -> Seen:
    c = len(method.trajectory)
    total, margins = torch.zeros(2, len(rows), dtype=torch.float64)
    chances, found, last = None, None, None
    for found in _evaluations(method, train, source, rows, whole, bar):
        total = total + last_loss(found)
        if found.logits is not None:
            last = -margin(found)
            margins = margins + last
            likely = found.logits[0].double().softmax(1)
            chances = likely if chances is None else chances + likely
    assert found is not None
    if chances is None or found.labels is None:
        return Seen(last_loss(found), total / c)
    chances, given = chances / c, found.labels
    agreement = None
    if votes is not None:
        shares = votes.votes(torch.arange(rows.start, rows.stop))
        agreement = shares.gather(1, given[:, None])[:, 0]
        chances = (chances + shares) / 2
    others = chances.scatter(1, given[:, None], -1.0)
    return Seen(
        loss=last_loss(found),
        mean_loss=total / c,
        labels=given,
        margin=last,
        aum=margins / c,
        neighbour_agreement=agreement,
        doubt=others.amax(1) - chances.gather(1, given[:, None])[:, 0],
        predicted=chances.argmax(1),
        suggested=others.argmax(1),
    )


def chosen_checkpoints(c: int) -> list[int]:
    """The checkpoints at which neighbours are sought: after a third and two thirds of the trajectory, and the last one.

    Args:
        c: The number of checkpoints.

    Returns:
        Positions in ascending order, each once.

    Example:
        >>> chosen_checkpoints(8), chosen_checkpoints(1)
        ([2, 5, 7], [0])
    """
    return sorted({c // 3, 2 * c // 3, c - 1})


def features_of(
    method: TracInCP, train: Any, checkpoints: list[int] | None = None
) -> tuple[list[Tensor], Tensor]:
    """What the last ``Linear`` sees of every row at some checkpoints, and the given classes.

    Args:
        method: Task, checkpoints and settings.
        train: The rows.
        checkpoints: Positions; ``chosen_checkpoints`` unless given.

    Returns:
        Features [n, d] for each checkpoint, and labels [n].

    Raises:
        DataError: A label without a logit.
    """
    settings = method.settings
    places = chosen_checkpoints(len(method.trajectory)) if checkpoints is None else checkpoints
    found = [
        layer_rows(
            method.task,
            method.trajectory[at],
            train,
            batch_size=settings.batch_size,
            collate=settings.collate,
            device=settings.device,
            memory=max(1, settings.memory // len(places)),
        )
        for at in places
    ]
    labels = found[-1].labels
    if labels is None:
        raise DataError(
            "the task tells no labels: give Task(outputs=...), or use a ready-made classification loss."
        )
    return [part.features for part in found], labels


def has_head(method: TracInCP) -> bool:
    """Whether the model has a ``Linear`` whose input neighbours can be sought in."""
    return last_linear(method.task.model) is not None


def targets_of(method: TracInCP, train: Any) -> tuple[Tensor, Tensor] | None:
    """Targets and predictions of a regression with one target per row.

    Args:
        method: Task, checkpoints and settings.
        train: The rows.

    Returns:
        The targets [n] and the predictions, the mean over the checkpoints [n], float64; None unless the loss is
        ``losses.mean_squared_error`` with one target per row.
    """
    if method.task.loss is not losses.mean_squared_error:
        return None
    settings, c = method.settings, len(method.trajectory)
    rows = open_rows(train, name="train", batch_size=settings.batch_size, collate=settings.collate)
    targets = torch.zeros(len(rows), dtype=torch.float64)
    predicted = torch.zeros_like(targets)
    with guarded(method.task.model, settings.device) as loaded, torch.no_grad():
        for checkpoint in method.trajectory:
            loaded.load(checkpoint)
            for batch in rows.batches():
                inputs, wanted = split_batch(to_device(batch.value, loaded.device, copy=True))
                if wanted.numel() != batch.size:
                    return None
                place = slice(batch.start, batch.start + batch.size)
                targets[place] = wanted.detach().reshape(-1).double().cpu()
                predicted[place] += predict(method.task.model, inputs).reshape(-1).double().cpu()
    return targets, predicted / c
